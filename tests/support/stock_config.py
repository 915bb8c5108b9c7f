"""The configuration that stock should read from a checkpoint of the zoo.

Stock has fixed sizes for some architectures under official names only, and does not know some
fields of `config.json`. What it would miss is repaired here, field by field, before it goes on.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version

from tests.support.zoo import Case

TRANSFORMER_LENS = Version(metadata.version("transformer_lens"))

CONFIG_REPAIRS: dict[str, str] = {
    "GPT2LMHeadModel": "stock reads config.n_ctx, which transformers 5 does not write",
    "PhiForCausalLM": "stock reads config.partial_rotary_factor, which transformers 5 moved",
    "GemmaForCausalLM": "stock has fixed sizes under official names only",
    "Gemma2ForCausalLM": "stock has fixed sizes under official names only",
    "Gemma3ForCausalLM": "stock has fixed sizes under official names only",
    "Gemma3ForConditionalGeneration": "stock has fixed sizes under official names only",
    "OlmoForCausalLM": "stock has fixed sizes under official names only",
    "Olmo2ForCausalLM": "stock has fixed sizes under official names only",
    "LlamaForCausalLM": "stock takes hidden_size / num_attention_heads for head_dim",
}
"""Architectures whose configuration is repaired here before stock goes on: architecture -> why."""

OLDER_CONFIG_REPAIRS: dict[str, str] = {
    "ApertusForCausalLM": "stock asks the configuration for the norms of queries and keys",
    "GemmaForCausalLM": "stock takes gemma-2b, whose table it uses here, for a Gemma 2",
    "Gemma3ForConditionalGeneration": "stock has no stretched rotary embeddings",
    "GptOssForCausalLM": "stock ignores the sliding window",
    "GPTNeoXForCausalLM": "stock takes every model for one with parallel blocks",
    "LlamaForCausalLM": "stock reads rotary bases of official names only",
    "Phi3ForCausalLM": "stock ignores the sliding window",
}
"""The same for TransformerLens 2, which reads less of a configuration."""

# Official names whose tables stock uses for an architecture, whatever its sizes.
TABLES = {
    "GemmaForCausalLM": "google/gemma-2b",
    "Gemma2ForCausalLM": "google/gemma-2-2b",
    "Gemma3ForCausalLM": "google/gemma-3-1b-pt",
    "Gemma3ForConditionalGeneration": "google/gemma-3-4b-it",
    "OlmoForCausalLM": "allenai/OLMo-1B-hf",
    "Olmo2ForCausalLM": "allenai/OLMo-2-0425-1B",
}


def hf_config(case: Case, folder: Path) -> Any:
    """The Hugging Face configuration, with the fields that stock misses under transformers 5."""
    raw = json.loads((folder / "config.json").read_text())
    if case.architecture == "QWenLMHeadModel":
        return types.SimpleNamespace(**raw)
    config = transformers.AutoConfig.from_pretrained(folder)
    if case.architecture == "GPT2LMHeadModel":
        config.n_ctx = config.n_positions
    if case.architecture == "PhiForCausalLM" and not hasattr(config, "partial_rotary_factor"):
        config.partial_rotary_factor = config.rope_parameters["partial_rotary_factor"]
    return config


def repairs(architecture: str, hf_config: Any) -> Mapping[str, Any]:
    """Fields that stock takes from a table of official names, here from the configuration."""
    older: dict[str, Any] = {}
    if TRANSFORMER_LENS.major < 3:
        older = {"original_architecture": architecture, **_older_repairs(architecture, hf_config)}
    if architecture == "LlamaForCausalLM":
        d_head = _d_head(hf_config)
        return {"d_head": d_head, "rotary_dim": d_head, **older}
    if architecture not in TABLES:
        return older
    config = getattr(hf_config, "text_config", hf_config)
    d_head = _d_head(config)
    fields = {
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": config.num_attention_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "eps": getattr(config, "rms_norm_eps", 1e-5),
        "d_vocab": config.vocab_size,
        "rotary_dim": d_head,
        "initializer_range": config.initializer_range,
        "act_fn": getattr(config, "hidden_activation", None) or config.hidden_act,
    }
    if architecture.startswith("Olmo"):
        return fields | {
            "rotary_base": _rope_theta(config),
            "attn_types": ["global"] * config.num_hidden_layers,
            "clip_qkv": getattr(config, "clip_qkv", None),
        }
    fields["n_key_value_heads"] = config.num_key_value_heads
    fields["rotary_base"] = _rope_theta(config)
    if architecture.startswith("Gemma3"):
        fields |= _gemma3_rope(config)
    if architecture != "GemmaForCausalLM":
        fields["window_size"] = config.sliding_window
        fields["attn_types"] = [
            "local" if kind == "sliding_attention" else "global" for kind in config.layer_types
        ]
        if config.query_pre_attn_scalar != d_head:
            fields["attn_scale"] = math.sqrt(config.query_pre_attn_scalar)
    if architecture == "Gemma2ForCausalLM":
        fields["attn_scores_soft_cap"] = config.attn_logit_softcapping
        fields["output_logits_soft_cap"] = config.final_logit_softcapping
    return fields | older


def _d_head(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope_theta(config: Any) -> float:
    """transformers 5 has moved it, and has one per kind of layer for some models."""
    return getattr(config, "rope_theta", None) or config.rope_parameters.get("rope_theta", 10000.0)


def _older_repairs(architecture: str, config: Any) -> Mapping[str, Any]:
    """What TransformerLens 2 does not read from a configuration, and version 3 does."""
    if architecture == "ApertusForCausalLM":
        return {"use_qk_norm": True}
    if architecture == "GPTNeoXForCausalLM":
        return {"parallel_attn_mlp": config.use_parallel_residual}
    if architecture == "GptOssForCausalLM":
        types = {"sliding_attention": "local", "full_attention": "global"}
        types = [types[kind] for kind in config.layer_types]
        return {"use_local_attn": True, "window_size": config.sliding_window, "attn_types": types}
    if architecture == "Phi3ForCausalLM" and config.sliding_window:
        types = ["local"] * config.num_hidden_layers
        return {"use_local_attn": True, "window_size": config.sliding_window, "attn_types": types}
    if architecture != "LlamaForCausalLM":
        return {}
    fields = {"rotary_base": config.rope_theta}
    if (config.rope_scaling or {}).get("rope_type") == "llama3":
        rope = config.rope_scaling
        fields |= {
            "use_NTK_by_parts_rope": True,
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_by_parts_factor": rope["factor"],
        }
    return fields


def _gemma3_rope(config: Any) -> Mapping[str, Any]:
    """Gemma 3 has one rotary base for full attention, maybe stretched, and one for sliding."""
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        full = {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}
        rope = {"full_attention": full, "sliding_attention": {}}
        rope["sliding_attention"]["rope_theta"] = config.rope_local_base_freq
    fields = {
        "rotary_base": rope["full_attention"]["rope_theta"],
        "rotary_base_local": rope["sliding_attention"]["rope_theta"],
    }
    if TRANSFORMER_LENS.major >= 3:
        fields["rotary_scaling_factor"] = rope["full_attention"].get("factor", 1.0)
    return fields
