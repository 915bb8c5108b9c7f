"""Configurations and random weights of the zoo's models that transformers can build."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

# d_model 30 with 5 heads of 6, or 36 with 6 heads of 6: sizes that no power of two explains away.
_MHA = {"hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 5}
_GQA = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2}
_GQA_1 = {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1}
_SMALL = {
    "vocab_size": 101,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "max_position_embeddings": 29,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_GPT2 = {
    "vocab_size": 101,
    "n_positions": 19,
    "n_embd": 30,
    "n_layer": 2,
    "n_head": 3,
    "layer_norm_epsilon": 2e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NEOX = {
    "vocab_size": 103,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 84,
    "max_position_embeddings": 23,
    "rotary_pct": 0.25,
    "layer_norm_eps": 2e-5,
}
_BLOOM = {"vocab_size": 107, "hidden_size": 36, "n_layer": 2, "n_head": 4, "pad_token_id": 3}
_GEMMA = {**_SMALL, "hidden_size": 36, "num_attention_heads": 3, "head_dim": 10}
_GEMMA_2 = {
    **_GEMMA,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 4,
    "query_pre_attn_scalar": 10,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
}
_GEMMA_3 = {
    **_GEMMA,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 4,
    "query_pre_attn_scalar": 10,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
_GPT_OSS = {
    **_SMALL,
    **_GQA,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 4,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 8,
    },
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "gpt2-hub": ("GPT2LMHeadModel", {**_GPT2, "n_ctx": 19, "n_head": 5, "n_layer": 3}),
    "gpt2-stanford": (
        "GPT2LMHeadModel",
        {**_GPT2, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": 101,
            "max_position_embeddings": 19,
            "hidden_size": 36,
            "num_layers": 3,
            "num_heads": 3,
            "attention_types": [[["global", "local"], 1], [["local"], 1]],
            "window_size": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": (
        "OPTForCausalLM",
        {
            "vocab_size": 101,
            "hidden_size": 30,
            "num_hidden_layers": 2,
            "ffn_dim": 52,
            "max_position_embeddings": 19,
            "num_attention_heads": 5,
            "word_embed_proj_dim": 30,
        },
    ),
    "gptj": (
        "GPTJForCausalLM",
        {
            "vocab_size": 101,
            "n_positions": 19,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 3,
            "rotary_dim": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "neox": ("GPTNeoXForCausalLM", _NEOX),
    "neox-sequential": ("GPTNeoXForCausalLM", {**_NEOX, "use_parallel_residual": False}),
    "neox-hub": ("GPTNeoXForCausalLM", {**_NEOX, "rotary_pct": 0.5, "rotary_emb_base": 10000}),
    "llama": ("LlamaForCausalLM", {**_SMALL, **_MHA}),
    "llama-gqa": (
        "LlamaForCausalLM",
        {**_SMALL, **_GQA, "num_hidden_layers": 3, "rope_theta": 500000.0, "rms_norm_eps": 1e-5},
    ),
    "llama-gqa1-tied": ("LlamaForCausalLM", {**_SMALL, **_GQA_1, "tie_word_embeddings": True}),
    "llama3-rope": (
        "LlamaForCausalLM",
        {**_SMALL, **_GQA, "rope_theta": 500000.0, "rope_scaling": _LLAMA3_ROPE},
    ),
    "llama-hub": (
        "LlamaForCausalLM",
        {**_SMALL, **_GQA, "rope_theta": 500000.0, "rope_scaling": _LLAMA3_ROPE},
    ),
    "llama-head-dim": ("LlamaForCausalLM", {**_SMALL, **_GQA, "head_dim": 10}),
    "mistral": ("MistralForCausalLM", {**_SMALL, **_GQA, "sliding_window": 4}),
    "mistral-nemo": (
        "MistralForCausalLM",
        {**_SMALL, **_GQA_1, "sliding_window": None, "head_dim": 8, "rope_theta": 1000000.0},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {**_SMALL, **_GQA, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "bloom": ("BloomForCausalLM", _BLOOM),
    "bloom-hub": ("BloomForCausalLM", {**_BLOOM, "n_layer": 3}),
    "bloom-5-heads": ("BloomForCausalLM", {**_BLOOM, "hidden_size": 30, "n_head": 5}),
    "qwen2": ("Qwen2ForCausalLM", {**_SMALL, **_GQA, "rope_theta": 1000000.0}),
    "qwen2-mha-tied": ("Qwen2ForCausalLM", {**_SMALL, **_MHA, "tie_word_embeddings": True}),
    "qwen3": (
        "Qwen3ForCausalLM",
        {**_SMALL, **_GQA, "head_dim": 10, "tie_word_embeddings": True, "rope_theta": 1000000.0},
    ),
    "qwen3-mha": ("Qwen3ForCausalLM", {**_SMALL, **_MHA, "head_dim": 8}),
    "phi": (
        "PhiForCausalLM",
        {
            **_SMALL,
            "hidden_size": 48,
            "num_attention_heads": 3,
            "partial_rotary_factor": 0.5,
            "hidden_act": "gelu_new",
        },
    ),
    "phi3": ("Phi3ForCausalLM", {**_SMALL, **_MHA, "sliding_window": 4}),
    "phi3-gqa": ("Phi3ForCausalLM", {**_SMALL, **_GQA, "sliding_window": None}),
    "gemma": ("GemmaForCausalLM", {**_GEMMA, "num_key_value_heads": 1}),
    "gemma-mha": ("GemmaForCausalLM", {**_GEMMA, "num_key_value_heads": 3}),
    "gemma2": ("Gemma2ForCausalLM", _GEMMA_2),
    "gemma2-scale": ("Gemma2ForCausalLM", {**_GEMMA_2, "query_pre_attn_scalar": 6}),
    "gemma3": ("Gemma3ForCausalLM", _GEMMA_3),
    "gemma3-vision": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {
                **_GEMMA_3,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "boi_token_index": 97,
            "eoi_token_index": 98,
            "image_token_index": 99,
        },
    ),
    "olmo": ("OlmoForCausalLM", {**_SMALL, **_MHA}),
    "olmo-clip": ("OlmoForCausalLM", {**_SMALL, **_MHA, "clip_qkv": 0.7}),
    "olmo2": ("Olmo2ForCausalLM", {**_SMALL, **_MHA, "rope_theta": 500000.0}),
    "olmo3": (
        "Olmo3ForCausalLM",
        {
            **_SMALL,
            **_MHA,
            "num_hidden_layers": 3,
            "layer_types": _SLIDING,
            "sliding_window": 4,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "attention_factor": 1.2,
                "original_max_position_embeddings": 8,
            },
        },
    ),
    "olmo3-gqa": (
        "Olmo3ForCausalLM",
        {**_SMALL, **_GQA, "num_hidden_layers": 3, "layer_types": _SLIDING, "sliding_window": 4},
    ),
    "olmoe": (
        "OlmoeForCausalLM",
        {**_SMALL, **_MHA, "num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": False},
    ),
    "olmoe-gqa": (
        "OlmoeForCausalLM",
        {**_SMALL, **_GQA, "num_experts": 4, "num_experts_per_tok": 3, "norm_topk_prob": True},
    ),
    "apertus": ("ApertusForCausalLM", {**_SMALL, **_GQA, "rope_scaling": _LLAMA3_ROPE}),
    "gpt-oss": ("GptOssForCausalLM", _GPT_OSS),
}

HUB_STYLE = {"gpt2-hub", "neox-hub", "bloom-hub", "llama-hub"}
"""Cases written as their old hub repositories are: bare names, stale buffers, flat config.json."""


def randomize(model: torch.nn.Module, architecture: str, generator: torch.Generator) -> None:
    """Give every parameter random values; norm weights lie around one, biases around zero."""
    norm_mean = 0.0 if architecture.startswith("Gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            leaf = name.rpartition(".")[2]
            if is_norm_weight(name):
                value = norm_mean + 0.2 * noise
            elif parameter.ndim < 2 or leaf.endswith("bias"):
                value = 0.2 * noise
            elif "embed" in name or "wte" in name or "wpe" in name:
                value = 0.5 * noise
            else:
                # Wide enough that attention is far from uniform.
                value = 1.2 * noise / math.sqrt(parameter.shape[-1])
            parameter.copy_(value)


def is_norm_weight(name: str) -> bool:
    """Whether a Hugging Face parameter name is that of a norm's weight."""
    module, _, leaf = name.rpartition(".")
    module = module.rpartition(".")[2]
    return leaf == "weight" and ("norm" in module or module.startswith("ln"))


def as_on_the_hub(
    case_id: str, config: Mapping[str, Any], tensors: Tensors, aliases: dict[str, str]
) -> tuple[Tensors, dict[str, str]]:
    """Rename the tensors of an old repository and add the buffers that its files still hold."""
    if case_id in ("gpt2-hub", "bloom-hub"):
        tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        aliases = {}
    if case_id == "gpt2-hub":
        n_ctx = config["n_positions"]
        mask = torch.ones(n_ctx, n_ctx).tril().view(1, 1, n_ctx, n_ctx)
        for layer in range(config["n_layer"]):
            tensors[f"h.{layer}.attn.bias"] = mask.clone()
    if case_id == "neox-hub":
        n_ctx = config["max_position_embeddings"]
        for layer in range(config["num_hidden_layers"]):
            attention = f"gpt_neox.layers.{layer}.attention"
            tensors[f"{attention}.bias"] = torch.ones(1, 1, n_ctx, n_ctx).tril().bool()
            tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
            tensors[f"{attention}.rotary_emb.inv_freq"] = torch.ones(4)
    if case_id == "llama-hub":
        for layer in range(config["num_hidden_layers"]):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    return tensors, aliases


def hub_config(architecture: str, model_type: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` as transformers 4 wrote it: flat, `rope_scaling`, `n_ctx`, `rotary_pct`."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **config,
        "transformers_version": "4.30.0",
    }
