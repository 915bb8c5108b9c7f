"""Config dictionaries of the families that TransformerLens knows only by their official names.

TransformerLens has one table per published Gemma, OLMo and OLMo 2 model and none for any other
checkpoint of these architectures. Here the same keys are filled from the Hugging Face config.
Rotary scaling is added by the caller, as it is for every other architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tl_fastload.ground import compat

GEMMA_3_CONTEXT_CAP = 8192
"""TransformerLens' own cap for Gemma 3: longer contexts are asked for with `n_ctx=`."""


def _common(config: Any) -> dict[str, Any]:
    return {
        "d_model": config.hidden_size,
        "d_head": head_dim(config),
        "n_heads": config.num_attention_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "initializer_range": config.initializer_range,
        "positional_embedding_type": "rotary",
        "gated_mlp": True,
    }


def head_dim(config: Any) -> int:
    """Width of one attention head: the config's own, else `hidden_size / num_attention_heads`."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _gemma_1_activation(config: Any) -> str:
    """The activation that the installed transformers computes for the first Gemma."""
    if compat.GEMMA_1_HAS_HIDDEN_ACTIVATION:
        return getattr(config, "hidden_activation", None) or "gelu_pytorch_tanh"
    return str(config.hidden_act)


def _gemma(config: Any) -> dict[str, Any]:
    return {
        **_common(config),
        "eps": config.rms_norm_eps,
        "act_fn": getattr(config, "hidden_activation", None) or config.hidden_act,
        "normalization_type": "RMS",
        "rotary_dim": head_dim(config),
        "use_attn_scale": True,
        "n_key_value_heads": config.num_key_value_heads,
        "final_rms": True,
    }


def _gemma_1(config: Any) -> dict[str, Any]:
    return {**_gemma(config), "act_fn": _gemma_1_activation(config)}


def _gemma_2(config: Any) -> dict[str, Any]:
    fields = {**_gemma(config), "use_normalization_before_and_after": True}
    if config.query_pre_attn_scalar != head_dim(config):
        fields["attn_scale"] = math.sqrt(config.query_pre_attn_scalar)
    if getattr(config, "attn_logit_softcapping", None):
        fields["attn_scores_soft_cap"] = config.attn_logit_softcapping
    if getattr(config, "final_logit_softcapping", None):
        fields["output_logits_soft_cap"] = config.final_logit_softcapping
    return fields


def _gemma_3(config: Any) -> dict[str, Any]:
    fields = {**_gemma_2(config), "use_qk_norm": True}
    # Its attention has no soft cap, whatever the field says.
    fields.pop("attn_scores_soft_cap", None)
    fields["n_ctx"] = min(config.max_position_embeddings, GEMMA_3_CONTEXT_CAP)
    return fields


def _gemma_3_multimodal(config: Any) -> dict[str, Any]:
    fields = _gemma_3(config)
    # Gemma3ForConditionalGeneration ignores the cap on logits that Gemma3ForCausalLM applies.
    fields.pop("output_logits_soft_cap", None)
    return fields


def _olmo(config: Any) -> dict[str, Any]:
    return {
        **_common(config),
        # OlmoLayerNorm has no weights and fixes its epsilon.
        "eps": 1e-05,
        "act_fn": config.hidden_act,
        "normalization_type": "LN",
        "attn_types": ["global"] * config.num_hidden_layers,
        "clip_qkv": getattr(config, "clip_qkv", None),
    }


def _olmo_2(config: Any) -> dict[str, Any]:
    fields = {
        **_common(config),
        "eps": config.rms_norm_eps,
        "act_fn": config.hidden_act,
        "normalization_type": "RMS",
        "attn_types": ["global"] * config.num_hidden_layers,
    }
    if config.num_key_value_heads != config.num_attention_heads:
        fields["n_key_value_heads"] = config.num_key_value_heads
    return fields


FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "GemmaForCausalLM": _gemma_1,
    "Gemma2ForCausalLM": _gemma_2,
    "Gemma3ForCausalLM": _gemma_3,
    "Gemma3ForConditionalGeneration": _gemma_3_multimodal,
    "OlmoForCausalLM": _olmo,
    "Olmo2ForCausalLM": _olmo_2,
}
"""Architecture -> dictionary from a (text) config."""
