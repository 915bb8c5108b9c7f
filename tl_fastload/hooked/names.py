"""TransformerLens' names of parameters: the one place that knows what each of them is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import nn

from tl_fastload.ground.role import ATTENTION_NORM, MLP_NORM, Part, Role
from tl_fastload.ground.wrappers import without_wrapper_parts

_HIDDEN_NORM, _FINAL_NORM = "hidden norm", "final norm"
# Name (without numbers), part, what it is, its sides (what it multiplies in brackets), and the norm
# that it reads. Each may have a bias. A key or value may have fewer heads than a query.
_MATRICES: tuple[tuple[str, Part, str, str, str], ...] = (
    ("embed.W_E", "embedding", "embedding", "[d_vocab] d_model", ""),
    ("pos_embed.W_pos", "embedding", "position embedding", "[n_ctx] d_model", ""),
    ("blocks.attn.W_Q", "attention", "query", "head [d_model] d_head", ATTENTION_NORM),
    ("blocks.attn.W_K", "attention", "key", "head [d_model] d_head", ATTENTION_NORM),
    ("blocks.attn.W_V", "attention", "value", "head [d_model] d_head", ATTENTION_NORM),
    ("blocks.attn.W_O", "attention", "output", "[head] [d_head] d_model", ""),
    ("blocks.mlp.W_in", "MLP", "MLP input", "[d_model] d_mlp", MLP_NORM),
    ("blocks.mlp.W_gate", "MLP", "MLP gate", "[d_model] d_mlp", MLP_NORM),
    ("blocks.mlp.W_out", "MLP", "MLP output", "[d_mlp] d_model", _HIDDEN_NORM),
    ("blocks.mlp.W_gate.weight", "MLP", "router", "expert [d_model]", MLP_NORM),
    ("blocks.mlp.experts.W_in.weight", "MLP", "expert's input", "d_mlp [d_model]", MLP_NORM),
    ("blocks.mlp.experts.W_gate.weight", "MLP", "expert's gate", "d_mlp [d_model]", MLP_NORM),
    ("blocks.mlp.experts.W_out.weight", "MLP", "expert's output", "d_model [d_mlp]", ""),
    ("unembed.W_U", "embedding", "unembedding", "[d_model] d_vocab_out", _FINAL_NORM),
)
# Name, part, what it is, its side, and whether `fold_ln` folds it.
_NORMS: tuple[tuple[str, Part, str, str, bool], ...] = (
    ("embed.ln", "embedding", "embedding norm", "d_model", False),
    ("blocks.ln1", "norms", ATTENTION_NORM, "d_model", True),
    ("blocks.ln1_post", "norms", "norm behind attention", "d_model", False),
    ("blocks.attn.q_norm", "attention", "query norm", "d_normed", False),  # one head, or all
    ("blocks.attn.k_norm", "attention", "key norm", "d_normed", False),
    ("blocks.ln2", "norms", MLP_NORM, "d_model", True),
    ("blocks.ln2_post", "norms", "norm behind the MLP", "d_model", False),
    ("blocks.mlp.ln", "MLP", _HIDDEN_NORM, "d_mlp", True),
    ("ln_final", "norms", _FINAL_NORM, "d_model", True),
)
_OTHERS = {
    "blocks.attn.sinks": Role("attention", "other", "attention sinks", ("head",)),
    # Which of these there are depends on TransformerLens' version.
    **{f"blocks.attn.{leaf}": Role("attention", "table") for leaf in ("mask", "IGNORE", "alibi")},
    "blocks.attn.rotary_sin": Role("attention", "table", "rotary table"),
    "blocks.attn.rotary_cos": Role("attention", "table", "rotary table"),
    **{
        f"blocks.mlp.act_fn.{leaf}": Role("MLP", "other", "activation function")
        for leaf in ("alpha_p", "alpha_n", "beta", "eps")
    },
}


def _roles() -> Iterator[tuple[str, Role]]:
    for name, part, what, text, reads in _MATRICES:
        sides = tuple(side.strip("[]") for side in text.split())
        inputs = tuple(side.strip("[]") for side in text.split() if side.startswith("["))
        outputs = tuple(side for side in sides if side not in inputs)
        is_last = reads == _FINAL_NORM
        yield name, Role(part, "matrix", what, sides, inputs, reads, is_last=is_last)
        bias = re.sub("W_([^.]*)$", r"b_\1", name).replace(".weight", ".bias")
        yield bias, Role(part, "bias", what, outputs, is_bias=True, is_last=is_last)
    for name, part, what, side, is_folded in _NORMS:
        is_last = what == _FINAL_NORM
        weight = Role(part, "norm", what, (side,), is_folded=is_folded, is_last=is_last)
        yield f"{name}.w", weight
        yield f"{name}.b", replace(weight, is_bias=True)


_ROLES = {**_OTHERS, **dict(_roles())}
_NUMBER = re.compile(r"(?<=\.)\d+\.")
_LAYER = re.compile(r"blocks\.(\d+)\.")
_FOLDED = ("LayerNormPre", "RMSNormPre")


@lru_cache(maxsize=1 << 16)  # one load asks a dozen times for each of its parameters
def role(name: str) -> Role:
    """What a parameter or a buffer of a HookedTransformer is.

    Args:
        name: in the model; wrappers' parts in it (`_orig_mod.`) do not matter.
    """
    bare = without_wrapper_parts(name)
    block = _LAYER.match(bare)
    # Underscores are in front of what several query heads share.
    kind = _NUMBER.sub("", bare).replace("._", ".")
    return _role_in(kind if kind in _ROLES else "", None if block is None else int(block.group(1)))


@lru_cache(maxsize=1 << 13)  # a layer's experts share it
def _role_in(kind: str, layer: int | None) -> Role:
    return replace(_ROLES.get(kind, Role()), layer=layer)


def folded_norms(cfg: Any) -> Iterator[tuple[str, int]]:
    """Name and length of each weight and bias of the norms that `fold_ln` folds.

    Args:
        cfg: a HookedTransformerConfig.
    """
    norms = ["ln1"] if cfg.attn_only else ["ln1", "ln2"]
    if not cfg.attn_only and cfg.is_layer_norm_activation():
        norms.append("mlp.ln")
    blocks = [f"blocks.{layer}.{norm}" for layer in range(cfg.n_layers) for norm in norms]
    for name in (f"{norm}.{leaf}" for norm in (*blocks, "ln_final") for leaf in "wb"):
        yield name, int(getattr(cfg, role(name).sides[0]))


def is_unread(name: str, cfg: Any) -> bool:
    """Whether a parameter is the position embedding of a model that has ALiBi instead, which
    TransformerLens has and never reads.

    Args:
        name: of the parameter.
        cfg: a HookedTransformerConfig.
    """
    return cfg.positional_embedding_type == "alibi" and role(name).what == "position embedding"


def folded_names(model: nn.Module) -> list[str]:
    """The weights and biases of norms that a model has folded into what reads them."""
    norms = [n for n, module in model.named_modules() if type(module).__name__ in _FOLDED]
    return [f"{norm}.{leaf}" for norm in norms for leaf in "wb"]
