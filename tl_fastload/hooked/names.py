"""TransformerLens' names of parameters: the one place that knows what each of them is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from tl_fastload.ground.role import Part, Role
from tl_fastload.ground.wrappers import without_wrapper_parts

_NUMBER = re.compile(r"(?<=\.)\d+\.")
_LAYER = re.compile(r"blocks\.(\d+)\.")
ATTENTION_NORM, MLP_NORM = "attention norm", "MLP norm"
_FOLDED_NORMS = ("LayerNormPre", "RMSNormPre")


def _matrix(part: Part, what: str, sides: str, inputs: str, reads: str = "") -> Role:
    return Role(part, "matrix", what, tuple(sides.split()), tuple(inputs.split()), reads)


def _bias(part: Part, what: str, sides: str) -> Role:
    return Role(part, "bias", what, tuple(sides.split()), is_bias=True)


def _norm(name: str, part: Part, what: str, side: str, is_folded: bool) -> dict[str, Role]:
    weight = Role(part, "norm", what, (side,), is_folded=is_folded)
    return {f"{name}.w": weight, f"{name}.b": replace(weight, is_bias=True)}


_HIDDEN, _FINAL = "hidden norm", "final norm"
# The heads that a key or a value has are fewer than a query's in some models.
_HEADS_IN = {
    f"blocks.attn.{kind}_{letter}": made
    for letter, what in (("Q", "query"), ("K", "key"), ("V", "value"))
    for kind, made in (
        ("W", _matrix("attention", what, "head d_model d_head", "d_model", ATTENTION_NORM)),
        ("b", _bias("attention", what, "head d_head")),
    )
}
# TransformerLens' own matrices, and those of experts, which are `nn.Linear`.
_MLP = {
    f"blocks.mlp.{leaf}": made
    for name, what, sides, inputs, reads in (
        ("in", "MLP input", ("d_model", "d_mlp"), "d_model", MLP_NORM),
        ("gate", "MLP gate", ("d_model", "d_mlp"), "d_model", MLP_NORM),
        ("out", "MLP output", ("d_mlp", "d_model"), "d_mlp", _HIDDEN),
    )
    for leaf, made in (
        (f"W_{name}", _matrix("MLP", what, " ".join(sides), inputs, reads)),
        (f"b_{name}", _bias("MLP", what, sides[1])),
        (
            f"experts.W_{name}.weight",
            _matrix("MLP", f"expert's {what}", " ".join(reversed(sides)), inputs, reads),
        ),
        (f"experts.W_{name}.bias", _bias("MLP", f"expert's {what}", sides[1])),
    )
}
_ROLES = {
    "embed.W_E": _matrix("embedding", "embedding", "d_vocab d_model", "d_vocab"),
    **_norm("embed.ln", "embedding", "embedding norm", "d_model", is_folded=False),
    "pos_embed.W_pos": _matrix("embedding", "position embedding", "n_ctx d_model", "n_ctx"),
    **_norm("blocks.ln1", "norms", ATTENTION_NORM, "d_model", is_folded=True),
    **_norm("blocks.ln1_post", "norms", "norm behind attention", "d_model", is_folded=False),
    **_HEADS_IN,
    # Over each head, or over all of them.
    **_norm("blocks.attn.q_norm", "attention", "query norm", "d_normed", is_folded=False),
    **_norm("blocks.attn.k_norm", "attention", "key norm", "d_normed", is_folded=False),
    "blocks.attn.W_O": _matrix("attention", "output", "head d_head d_model", "head d_head"),
    "blocks.attn.b_O": _bias("attention", "output", "d_model"),
    "blocks.attn.sinks": Role("attention", "other", "attention sinks", ("head",)),
    # Which of these there are depends on TransformerLens' version.
    **{
        f"blocks.attn.{leaf}": Role("attention", "table", what)
        for leaf, what in (
            *(("mask", "mask"), ("IGNORE", "mask"), ("alibi", "position table")),
            *(("rotary_sin", "rotary table"), ("rotary_cos", "rotary table")),
        )
    },
    **_norm("blocks.ln2", "norms", MLP_NORM, "d_model", is_folded=True),
    **_norm("blocks.ln2_post", "norms", "norm behind the MLP", "d_model", is_folded=False),
    **_MLP,
    "blocks.mlp.W_gate.weight": _matrix("MLP", "router", "expert d_model", "d_model", MLP_NORM),
    "blocks.mlp.W_gate.bias": _bias("MLP", "router", "expert"),
    **_norm("blocks.mlp.ln", "MLP", _HIDDEN, "d_mlp", is_folded=True),
    **{
        f"blocks.mlp.act_fn.{leaf}": Role("MLP", "other", "activation function")
        for leaf in ("alpha_p", "alpha_n", "beta", "eps")
    },
    **{
        name: replace(made, is_last=True)
        for name, made in {
            **_norm("ln_final", "norms", _FINAL, "d_model", is_folded=True),
            "unembed.W_U": _matrix(
                "embedding", "unembedding", "d_model d_vocab_out", "d_model", _FINAL
            ),
            "unembed.b_U": _bias("embedding", "unembedding", "d_vocab_out"),
        }.items()
    },
}
_OTHER = Role()


def role(name: str) -> Role:
    """What a parameter or a buffer of a HookedTransformer is.

    Args:
        name: in the model; wrappers' parts in it (`_orig_mod.`) do not matter.
    """
    bare = without_wrapper_parts(name)
    block = _LAYER.match(bare)
    # Underscores are in front of what several query heads share.
    found = _ROLES.get(_NUMBER.sub("", bare).replace("._", "."), _OTHER)
    return found if block is None else replace(found, layer=int(block.group(1)))


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
    norms = [n for n, module in model.named_modules() if type(module).__name__ in _FOLDED_NORMS]
    return [f"{norm}.{leaf}" for norm in norms for leaf in "wb"]
