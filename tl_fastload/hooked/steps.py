"""The processing steps: which of them a model allows and why not, and whether they were done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tl_fastload.errors import ArgumentError
from tl_fastload.ground import compat
from tl_fastload.request.steps import STEPS

# Their norms act on a sublayer's output, where neither folding nor centring is valid.
_POST_NORM = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")


def reason_to_skip(step: str, cfg: Any) -> str | None:
    """Why a step does not apply to a model, or None if it does.

    Args:
        step: one of `request.steps.STEPS`.
        cfg: the model's HookedTransformerConfig.
    """
    norm = cfg.normalization_type
    if cfg.positional_embedding_type == "shortformer" and step in STEPS[:3]:
        return "shortformer attention adds positions to queries and keys only"
    if cfg.original_architecture in _POST_NORM and step in STEPS[:2]:
        return f"{cfg.original_architecture} normalises after each sublayer"
    if step == "fold_ln" and norm not in ("LN", "LNPre", "RMS", "RMSPre"):
        return "the model has no normalisation weights"
    if step == "fold_ln" and drops_norms(cfg):
        return f"TransformerLens {compat.TRANSFORMER_LENS} folds no norms in front of experts"
    if step in STEPS[:2] and norm in ("LN", "LNPre") and _experts(cfg):
        # Neither the norm's bias nor the side of the experts' matrices that writes is seen to.
        return "TransformerLens folds and centres experts behind an RMSNorm only"
    if step == "center_writing_weights" and norm in ("RMS", "RMSPre"):
        return "RMSNorm does not remove the mean"
    if step == "center_writing_weights" and getattr(cfg, "final_rms", False):
        return "the final norm is an RMSNorm, which does not remove the mean"
    if step == "center_unembed" and getattr(cfg, "output_logits_soft_cap", None) not in (
        None,
        -1,
        -1.0,
        0,
    ):
        return "a soft cap on logits is not invariant under a shift"
    if step == "fold_value_biases" and getattr(cfg, "use_attention_sinks", False):
        return (
            "attention sinks make pattern rows sum to less than one, so the fold would change the "
            "model's output"
        )
    if step == "refactor_factored_attn_matrices" and cfg.positional_embedding_type == "rotary":
        return "rotary embeddings act between W_Q and W_K"
    return None


def drops_norms(cfg: Any) -> bool:
    """Whether stock's `from_pretrained` drops a model's norm weights when it is to fold them.

    TransformerLens 2 folds nothing into experts, but builds such a model without norm weights.

    Args:
        cfg: the model's HookedTransformerConfig.
    """
    return compat.REPLACES_NORMS and _experts(cfg) > 1


def _experts(cfg: Any) -> int:
    return getattr(cfg, "num_experts", None) or 0


def check_refactor(cfg: Any, flags: Mapping[str, bool]) -> None:
    """Raise ArgumentError if matrices are to be refactored that rotary embeddings stand between."""
    step = "refactor_factored_attn_matrices"
    reason = reason_to_skip(step, cfg)
    if flags[step] and reason is not None:
        raise ArgumentError(f"{step}=True cannot be done: {reason}. Leave it out.")


def is_processed(model: Any, flags: Mapping[str, bool]) -> bool:
    """Whether every step that is asked for, and that the model allows, would change nothing.

    Args:
        model: a HookedTransformer.
        flags: the processing steps.
    """
    asked = [step for step, on in flags.items() if on and reason_to_skip(step, model.cfg) is None]
    if "refactor_factored_attn_matrices" in asked:
        return False
    if "fold_ln" in asked and not str(model.cfg.normalization_type).endswith("Pre"):
        return False
    if "fold_value_biases" in asked and any(bool(b.any()) for b in _value_biases(model)):
        return False
    if "center_writing_weights" in asked and not all(map(_is_centred, _writing(model))):
        return False
    return "center_unembed" not in asked or _is_centred(model.unembed.W_U)


def _value_biases(model: Any) -> Iterator[torch.Tensor]:
    for block in model.blocks:
        attention = dict(block.attn.named_parameters(recurse=False))
        yield attention["_b_V"] if "_b_V" in attention else attention["b_V"]


def _writing(model: Any) -> Iterator[torch.Tensor]:
    """What writes to the residual stream, with d_model last."""
    yield model.embed.W_E
    if hasattr(model, "pos_embed"):
        yield model.pos_embed.W_pos
    for block in model.blocks:
        yield block.attn.W_O
        yield block.attn.b_O
        for name, parameter in block.named_parameters():
            if name in ("mlp.W_out", "mlp.b_out"):
                yield parameter


@torch.no_grad()
def _is_centred(weight: torch.Tensor) -> bool:
    """Whether the mean over the last dimension is no more than rounding leaves."""
    mean = weight.mean(-1, dtype=torch.float32).abs().max()
    return bool(mean <= torch.finfo(weight.dtype).eps * weight.abs().max().float())
