"""What each parameter of a bridge is: a shelf names them as the wrapped model does, and the parts
that TransformerLens splits as its components.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from tl_fastload.ground.role import ATTENTION_NORM, MLP_NORM, Part, Role
from tl_fastload.ground.wrappers import without_wrapper_parts

FINAL_NORM = "final norm"
# Modules (transformers' names and TransformerLens' components), part, what their weight is, its
# sides (what it multiplies in brackets), and the norm that it reads.
_MATRICES: tuple[tuple[str, Part, str, str, str], ...] = (
    (
        *("wte embed embed_tokens word_embeddings embed_in", "embedding", "embedding"),
        *("[v] d_model", ""),
    ),
    ("wpe pos_embed embed_positions", "embedding", "position embedding", "[n_ctx] d_model", ""),
    ("lm_head unembed embed_out", "embedding", "unembedding", "v [d_model]", FINAL_NORM),
    ("q q_proj", "attention", "query", "d_attn [d_model]", ATTENTION_NORM),
    ("k k_proj", "attention", "key", "d_attn [d_model]", ATTENTION_NORM),
    ("v v_proj", "attention", "value", "d_attn [d_model]", ATTENTION_NORM),
    (
        *("qkv qkv_proj c_attn query_key_value", "attention", "query, key and value"),
        *("d_attn [d_model]", ATTENTION_NORM),
    ),
    ("o o_proj out_proj dense attn.c_proj", "attention", "output", "d_model [d_attn]", ""),
    (
        *("in fc1 fc_in up_proj c_fc dense_h_to_4h", "MLP", "MLP input"),
        *("d_mlp [d_model]", MLP_NORM),
    ),
    ("gate_proj", "MLP", "MLP gate", "d_mlp [d_model]", MLP_NORM),
    ("gate_up_proj", "MLP", "MLP gate and input", "d_mlp [d_model]", MLP_NORM),
    (
        *("out fc2 fc_out down_proj c_proj dense_4h_to_h", "MLP", "MLP output"),
        *("d_model [d_mlp]", ""),
    ),
    ("gate router", "MLP", "router", "expert [d_model]", MLP_NORM),
)
_NORMS: tuple[tuple[str, Part, str], ...] = (
    (
        "ln1 ln_1 input_layernorm self_attn_layer_norm attention_layernorm",
        *("norms", ATTENTION_NORM),
    ),
    (
        "ln2 ln_2 post_attention_layernorm pre_feedforward_layernorm feedforward_layernorm "
        "blocks.final_layer_norm",
        *("norms", MLP_NORM),
    ),
    ("post_feedforward_layernorm", "norms", "norm behind the MLP"),
    ("q_norm", "attention", "query norm"),
    ("k_norm", "attention", "key norm"),
    ("ln_f ln_final norm final_layer_norm final_layernorm", "norms", FINAL_NORM),
)
_FOLDED = (ATTENTION_NORM, MLP_NORM, FINAL_NORM)


def _roles() -> Iterator[tuple[str, Role]]:
    for modules, part, what, text, reads in _MATRICES:
        sides = tuple(side.strip("[]") for side in text.split())
        inputs = tuple(side.strip("[]") for side in text.split() if side.startswith("["))
        last = reads == FINAL_NORM
        for module in modules.split():
            yield f"{module}.weight", Role(part, "matrix", what, sides, inputs, reads, is_last=last)
            outputs = tuple(side for side in sides if side not in inputs)
            bias = Role(part, "bias", what, outputs, is_bias=True, is_last=last)
            yield f"{module}.bias", bias
    for modules, part, what in _NORMS:
        for module in modules.split():
            weight = Role(
                *(part, "norm", what, ("d_model",)),
                is_folded=what in _FOLDED,
                is_last=what == FINAL_NORM,
            )
            yield f"{module}.weight", weight
            yield f"{module}.bias", replace(weight, is_bias=True)


_ROLES = dict(_roles())
_EXPERTS = re.compile(r"\.experts\.")
_LAYER = re.compile(r"\.(?:h|layers|blocks)\.(\d+)\.(.*)")
_OTHER = Role("other", "matrix", "weight", ("d_out", "d_in"), ("d_in",))


def role(name: str) -> Role:
    """What a parameter or a buffer of a bridge is.

    A linear layer inside a block that no table knows is a matrix all the same: what transformers
    quantizes does not depend on names.

    Args:
        name: of the parameter, as a shelf or a live bridge has it.
    """
    bare = without_wrapper_parts(name).replace("_original_component.", "")
    block = _LAYER.search("." + bare)
    if _EXPERTS.search(bare):
        sides = ("expert", "d_out", "d_in")
        found = Role("MLP", "matrix", "experts", sides, ("d_in",))
    else:
        *path, module, leaf = ("", "", *bare.split("."))
        before = f"{path[-1]}.{module}.{leaf}"
        inside = None if block is None else _ROLES.get(f"blocks.{module}.{leaf}")
        known = inside or _ROLES.get(before) or _ROLES.get(f"{module}.{leaf}")
        is_weight = block is not None and leaf == "weight"
        found = known or (_OTHER if is_weight else Role())
    return found if block is None else replace(found, layer=int(block.group(1)))
