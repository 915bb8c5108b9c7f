"""transformers' own rotary tables in a HookedTransformer, where no field of its configuration says
what transformers computes.

Each attention layer has a sine and a cosine for every position in two buffers. Any rotary
embedding whose frequencies do not depend on the input's length fits there. Where they do depend on
it, `n_ctx` decides: up to the context of pre-training the tables are transformers' for every
input; beyond it they are those of long inputs, if one table serves all of these.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tl_fastload.errors import warn_numbers
from tl_fastload.hooked.config_repairs import rope_of
from tl_fastload.hooked.config_rope import Rope, RopeContext, functions, rope_fields

_BUFFERS = ("rotary_sin", "rotary_cos")


def put_rope_tables(model: Any, hf_config: Any) -> list[str]:
    """Give a model transformers' rotary tables if its own code computes others.

    Args:
        model: an empty HookedTransformer, on the meta device or not; its tables are replaced.
        hf_config: the Hugging Face configuration.

    Returns:
        What the report has to say about it; what differs from transformers is warned of as well.
    """
    found = rope_of(vars(model.cfg), hf_config)
    if found is None:
        return []
    pair, context = found
    notes = [
        text
        for rope in _of_layers(model, pair)
        if (text := _limits(rope, context, model.cfg.n_ctx))
    ]
    if not rope_fields(pair, context)[1]:
        return notes
    for block in model.blocks:
        attention = block.attn
        rope = pair.sliding if attention.attn_type == "local" else pair.full
        device = attention.rotary_sin.device
        # Each layer has its own, as TransformerLens' have: files of safetensors share no memory.
        for name, table in zip(_BUFFERS, _tables(rope, context, model.cfg, device), strict=True):
            attention.register_buffer(name, table)
    kinds = sorted({rope.kind for rope in _of_layers(model, pair)})
    return [f"The rotary tables are transformers' own ({', '.join(kinds)}).", *notes]


def _of_layers(model: Any, pair: Any) -> list[Rope]:
    kinds = dict.fromkeys(block.attn.attn_type == "local" for block in model.blocks)
    ropes = [pair.sliding if is_local else pair.full for is_local in kinds]
    return ropes[:1] if len(ropes) == 2 and ropes[0] == ropes[1] else ropes


def _limits(rope: Rope, context: RopeContext, n_ctx: int) -> str:
    """What is to be said of a rotary embedding that depends on the length of the input."""
    if rope.kind == "longrope":
        original = context.original(rope)
        if n_ctx <= original:
            return (
                f"longrope: n_ctx={n_ctx} takes the short factors, as transformers does for inputs "
                f"of up to {original} tokens. The model was made for {context.max_positions}: a "
                "larger n_ctx= takes the long factors."
            )
        return warn_numbers(
            f"longrope: n_ctx={n_ctx} takes the long factors, as transformers does for inputs of "
            f"more than {original} tokens. Results for shorter inputs differ from transformers'; "
            f"load with n_ctx={original} for these."
        )
    if rope.kind == "dynamic" and n_ctx > context.max_positions:
        return warn_numbers(
            f"HookedTransformer cannot compute this model's 'dynamic' rotary scaling, whose "
            f"frequencies depend on the length of the input: with n_ctx={n_ctx}, results differ "
            f"from transformers' for inputs of more than {context.max_positions} tokens."
        )
    return ""


def _tables(
    rope: Rope, context: RopeContext, cfg: Any, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sine and cosine, each [n_ctx, rotary_dim], in the model's dtype."""
    if device.type == "meta":
        empty = torch.empty(cfg.n_ctx, cfg.rotary_dim, dtype=cfg.dtype, device=device)
        return empty, torch.empty_like(empty)
    with torch.device("cpu"):
        frequencies, scale = _frequencies(rope, context, cfg)
        positions = torch.arange(cfg.n_ctx, dtype=torch.float32)
        angles = positions[:, None] * frequencies.float()[None, :]
        angles = torch.cat((angles, angles), dim=-1)
        sine, cosine = angles.sin() * scale, angles.cos() * scale
    return sine.to(device, cfg.dtype), cosine.to(device, cfg.dtype)


def _frequencies(rope: Rope, context: RopeContext, cfg: Any) -> tuple[torch.Tensor, float]:
    if rope.kind in ("default", "dynamic"):
        exponents = torch.arange(0, cfg.rotary_dim, 2, dtype=torch.float32) / cfg.rotary_dim
        return 1.0 / rope.base**exponents, 1.0
    compute = functions()[rope.kind]
    return compute(  # type: ignore[no-any-return]
        _as_config(rope, context, cfg), torch.device("cpu"), seq_len=cfg.n_ctx
    )


def _as_config(rope: Rope, context: RopeContext, cfg: Any) -> Any:
    """A configuration with this one rotary embedding, in the notations of all transformers."""
    params = {
        "original_max_position_embeddings": context.original(rope),
        **rope.params,
        "rope_type": rope.kind,
        "rope_theta": rope.base,
        "partial_rotary_factor": 1.0,  # `head_dim` is what is rotated
    }
    if context.original_positions:
        params["original_max_position_embeddings"] = context.original_positions
    return SimpleNamespace(
        head_dim=cfg.rotary_dim,
        hidden_size=cfg.d_model,
        num_attention_heads=cfg.n_heads,
        max_position_embeddings=context.max_positions,
        original_max_position_embeddings=context.original(rope),
        partial_rotary_factor=1.0,
        rope_theta=rope.base,
        rope_scaling=params,
        rope_parameters=params,
        standardize_rope_params=lambda: None,
    )
