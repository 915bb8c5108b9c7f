"""What TransformerLens' reading of a config leaves out: corrections, refusals and notes.

Everything here compares against the code that transformers runs for the same config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from transformer_lens import HookedTransformerConfig
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

from tl_fastload.errors import UnsupportedArchitectureError, warn_numbers
from tl_fastload.ground.compat import TRANSFORMER_LENS
from tl_fastload.ground.hf_configs import text_config
from tl_fastload.hooked.config_families import head_dim
from tl_fastload.hooked.config_rope import (
    RopeContext,
    RopePair,
    read_rope,
    refuse_unknown,
    rope_fields,
)

FIELD_DEFAULTS = {
    field.name: field.default for field in dataclasses.fields(HookedTransformerConfig)
}
"""Fields of the installed HookedTransformerConfig (older ones have fewer) and their defaults."""

# The same function under the names that transformers gives it and that TransformerLens gives it.
_ACTIVATION_NAMES = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_new",
}
_ALL_LAYERS_SLIDE = ("MistralForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM")
_READS_LAYER_TYPES = (
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Olmo3ForCausalLM",
    "GptOssForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
)
_LAYER_TYPES = {"full_attention": "global", "sliding_attention": "local"}
# Their model classes read neither `rope_parameters` nor `head_dim`.
_FIXED_ROPE = ("GPTJForCausalLM",)
# transformers rotates a part of their heads, and whole heads of others, whatever a config says.
_ROTATES_A_PART = ("GPTNeoXForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM", "QWenLMHeadModel")
_FIXED_HEADS = ("GPTJForCausalLM", "GPTNeoXForCausalLM", "QWenLMHeadModel")

_Test = Callable[[Any], bool]


def _is_on(name: str) -> _Test:
    return lambda config: bool(getattr(config, name, False))


def _is_off(name: str) -> _Test:
    return lambda config: not getattr(config, name, True)


def _is_grouped(config: Any) -> bool:
    groups = getattr(config, "num_key_value_heads", None)
    return groups is not None and groups != config.num_attention_heads


def _is_not(name: str, value: Any) -> _Test:
    return lambda config: bool(getattr(config, name, value) != value)


def _heads_do_not_fill_model(config: Any) -> bool:
    return bool(head_dim(config) * config.num_attention_heads != config.hidden_size)


def _projects_embeddings(config: Any) -> bool:
    width = getattr(config, "word_embed_proj_dim", None)
    return width is not None and width != config.hidden_size


_BIDIRECTIONAL = ((_is_on("use_bidirectional_attention"), "attention in both directions"),)
_FULL_VECTOR_NORM = ((_heads_do_not_fill_model, "a head_dim other than hidden_size / heads"),)
_GROUPED = ((_is_grouped, "grouped key and value heads (num_key_value_heads)"),)

_REFUSALS: dict[str, tuple[tuple[_Test, str], ...]] = {
    "GPT2LMHeadModel": ((_is_on("add_cross_attention"), "cross-attention (add_cross_attention)"),),
    "BloomForCausalLM": (
        (
            _is_on("apply_residual_connection_post_layernorm"),
            "residual connections after the norm (apply_residual_connection_post_layernorm)",
        ),
    ),
    "OPTForCausalLM": (
        (_is_off("do_layer_norm_before"), "norms after each sublayer (do_layer_norm_before=false)"),
        (_projects_embeddings, "projected embeddings (word_embed_proj_dim is not hidden_size)"),
        (_is_off("enable_bias"), "linear maps without biases (enable_bias=false)"),
        (_is_off("layer_norm_elementwise_affine"), "norms without weights"),
        (_is_on("_remove_final_layer_norm"), "no final norm (_remove_final_layer_norm)"),
    ),
    "GPTNeoXForCausalLM": (
        (_is_off("attention_bias"), "attention without biases (attention_bias=false)"),
    ),
    "PhiForCausalLM": (
        (_is_on("qk_layernorm"), "normed queries and keys (qk_layernorm)"),
        *_GROUPED,
    ),
    "OlmoForCausalLM": _GROUPED,
    "Olmo2ForCausalLM": _FULL_VECTOR_NORM,
    "Olmo3ForCausalLM": _FULL_VECTOR_NORM,
    "OlmoeForCausalLM": _FULL_VECTOR_NORM,
    "GptOssForCausalLM": (
        (_is_not("swiglu_alpha", 1.702), "another swiglu_alpha than 1.702"),
        (_is_not("swiglu_limit", 7.0), "another swiglu_limit than 7.0"),
    ),
    "GemmaForCausalLM": _BIDIRECTIONAL,
    "Gemma2ForCausalLM": _BIDIRECTIONAL,
    "Gemma3ForCausalLM": _BIDIRECTIONAL,
    "Gemma3ForConditionalGeneration": _BIDIRECTIONAL,
}

# Biases that these switches add to the checkpoint are not read by TransformerLens' converters.
_DROPPED_BIASES = ("attention_bias", "mlp_bias")
_READS_ATTENTION_BIAS = ("GptOssForCausalLM", "GPTNeoXForCausalLM")


def refuse_unsupported(config: Any, architecture: str) -> None:
    """Raise UnsupportedArchitectureError for a setting that HookedTransformer has no code for."""
    for is_set, setting in _REFUSALS.get(architecture, ()):
        if is_set(config):
            raise UnsupportedArchitectureError(
                f"This {architecture} has {setting}, which TransformerLens' HookedTransformer "
                "cannot represent. Load it with transformers instead."
            )


def repair(fields: dict[str, Any], config: Any, architecture: str) -> None:
    """Correct `fields` in place so that HookedTransformer computes what transformers does.

    fields: a config dictionary of TransformerLens.
    config: the Hugging Face (text) config.

    Raises UnsupportedArchitectureError for an activation function, an attention layout or a rotary
    scaling that HookedTransformer lacks. What stays different: `differences`.
    """
    _repair_activation(fields, architecture)
    _repair_blocks(fields, config, architecture)
    _repair_sliding_windows(fields, config, architecture)
    _repair_rope(fields, config, architecture)


def _repair_activation(fields: dict[str, Any], architecture: str) -> None:
    name = fields["act_fn"]
    name = _ACTIVATION_NAMES.get(name, name)
    if name not in SUPPORTED_ACTIVATIONS:
        raise UnsupportedArchitectureError(
            f"This {architecture} has the activation function {name!r}, which HookedTransformer "
            f"lacks. It has: {', '.join(sorted(SUPPORTED_ACTIVATIONS))}."
        )
    fields["act_fn"] = name


def _repair_blocks(fields: dict[str, Any], config: Any, architecture: str) -> None:
    """Widths, epsilon and order of the sublayers."""
    mlp = getattr(config, "n_inner", None)
    if architecture == "GPTNeoForCausalLM":
        mlp = getattr(config, "intermediate_size", None)
    if architecture in ("GPT2LMHeadModel", "GPTJForCausalLM", "GPTNeoForCausalLM") and mlp:
        fields["d_mlp"] = mlp
    if architecture == "GPTJForCausalLM":
        fields["eps"] = config.layer_norm_epsilon
    if architecture == "GPT2LMHeadModel":
        fields["use_attn_scale"] = config.scale_attn_weights
    if architecture == "GPTNeoXForCausalLM":
        fields["parallel_attn_mlp"] = config.use_parallel_residual
    if architecture == "ApertusForCausalLM":
        fields["use_qk_norm"] = True
    if fields.get("positional_embedding_type") == "rotary" and architecture not in _FIXED_HEADS:
        fields["d_head"] = head_dim(config)


def _repair_sliding_windows(fields: dict[str, Any], config: Any, architecture: str) -> None:
    if architecture == "GPTNeoForCausalLM":
        return
    types = _attention_types(config, architecture, fields["n_layers"])
    if "local" in types:
        window = config.sliding_window
        fields.update(use_local_attn=True, window_size=window, attn_types=types)
    elif fields.get("use_local_attn"):
        fields.update(use_local_attn=False, attn_types=types)


def _attention_types(config: Any, architecture: str, n_layers: int) -> list[str]:
    """`local` or `global` for each layer, as the model class of transformers decides it."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    # AutoConfig reads a Mistral checkpoint that has `layer_types` as a Ministral, which obeys them.
    obeyed = architecture in _READS_LAYER_TYPES or config.model_type == "ministral"
    if layer_types and obeyed:
        unknown = sorted(set(layer_types) - set(_LAYER_TYPES))
        if unknown:
            raise UnsupportedArchitectureError(
                f"This {architecture} has layers of the kinds {', '.join(unknown)} (layer_types); "
                f"HookedTransformer has {' and '.join(sorted(_LAYER_TYPES))} only."
            )
        return [_LAYER_TYPES[kind] if window else "global" for kind in layer_types]
    if architecture in _ALL_LAYERS_SLIDE and window:
        return ["local"] * n_layers
    if getattr(config, "use_sliding_window", False) and window:
        first = getattr(config, "max_window_layers", 0)
        return ["local" if layer >= first else "global" for layer in range(n_layers)]
    pattern = getattr(config, "sliding_window_pattern", None)
    if window and architecture == "Gemma2ForCausalLM":
        pattern = 2
    if window and pattern:
        return ["local" if (layer + 1) % pattern else "global" for layer in range(n_layers)]
    return ["global"] * n_layers


def rope_of(fields: Mapping[str, Any], hf_config: Any) -> tuple[RopePair, RopeContext] | None:
    """The rotary embeddings of a model; None for one without, or whose are fixed.

    fields: of its HookedTransformerConfig.
    hf_config: the Hugging Face config.
    """
    config = text_config(hf_config)
    is_rotary = fields.get("positional_embedding_type") == "rotary"
    if not is_rotary or fields.get("original_architecture") in _FIXED_ROPE:
        return None
    types = fields.get("attn_types") if fields.get("use_local_attn") else None
    context = RopeContext(
        max_positions=getattr(config, "max_position_embeddings", None) or fields["n_ctx"],
        has_sliding="local" in (types or ()),
        has_full="global" in (types or ("global",)),
        original_positions=getattr(config, "original_max_position_embeddings", None),
        fields=frozenset(FIELD_DEFAULTS),
    )
    return read_rope(config), context


def _repair_rope(fields: dict[str, Any], config: Any, architecture: str) -> None:
    found = rope_of(fields, config)
    if found is None:
        return
    pair, context = found
    width = fields["d_head"]
    if architecture in _ROTATES_A_PART:
        width = int(pair.full.partial * width)
    if width % 2:
        raise UnsupportedArchitectureError(
            f"This {architecture} rotates {width} of the {fields['d_head']} dimensions of a head; "
            "HookedTransformer rotates pairs and needs an even number."
        )
    if fields.get("rotary_dim", fields["d_head"]) != width:
        fields["rotary_dim"] = width
    rope, needs_tables = rope_fields(pair, context)
    if needs_tables:
        refuse_unknown([pair.full] * context.has_full + [pair.sliding] * context.has_sliding)
    if rope["rotary_base"] == fields.get("rotary_base", 10000):
        rope.pop("rotary_base")  # keeps TransformerLens' own int or float
    fields.update(rope)


def differences(fields: Mapping[str, Any], hf_config: Any) -> list[str]:
    """What HookedTransformer computes otherwise than transformers; warns of each.

    fields: of its HookedTransformerConfig.
    hf_config: the Hugging Face config.
    """
    config, architecture = text_config(hf_config), fields["original_architecture"]
    found = [
        f"config.json sets {name}: TransformerLens' converter for {architecture} does not read "
        "these biases, so that results differ from transformers' unless they are zero."
        for name in _DROPPED_BIASES
        if getattr(config, name, False) and architecture not in _READS_ATTENTION_BIAS
    ]
    if architecture == "GptOssForCausalLM" and "use_attention_sinks" not in FIELD_DEFAULTS:
        found.append(
            f"TransformerLens {TRANSFORMER_LENS} has no attention sinks: results are its own, and "
            "wrong. Version 3 computes what Hugging Face does."
        )
    heads = fields["n_heads"]
    if fields.get("positional_embedding_type") == "alibi" and heads & (heads - 1):
        found.append(
            f"HookedTransformer's ALiBi slopes for {heads} heads (not a power of two) are not "
            "Hugging Face's: results differ from position 1 on."
        )
    return [warn_numbers(text) for text in found]


def settle_context(fields: dict[str, Any], config: Any) -> list[str]:
    """Keep `n_ctx` to where one rotary table is transformers' for every input; say so where
    TransformerLens caps the context below what the config allows.
    """
    allowed = getattr(config, "max_position_embeddings", None)
    found = rope_of(fields, config)
    if found is not None and found[0].full.kind == "longrope":
        fields["n_ctx"] = min(fields["n_ctx"], found[1].original(found[0].full))
        return []  # `rope_tables` says so
    if not allowed or fields["n_ctx"] >= allowed:
        return []
    return [
        f"n_ctx is {fields['n_ctx']} as in TransformerLens; the model was made for {allowed} "
        "positions (pass n_ctx= for more)."
    ]
