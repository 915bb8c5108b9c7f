"""Tiny Hugging Face configs of every architecture, and what both libraries compute for them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens import loading_from_pretrained as loading
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tl_fastload.ground.borrow import borrow
from tl_fastload.hooked.architectures import SUPPORTED_ARCHITECTURES
from tl_fastload.hooked.config import config_dict
from tl_fastload.hooked.rope_tables import put_rope_tables

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MLP = {**_SIZES, "intermediate_size": 40}
_GQA = {**_MLP, "num_key_value_heads": 2}
_GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
_MIXED = {"layer_types": _LAYERS, "sliding_window": 5}

# Architecture -> (model type, keywords of its config class).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("gpt2", _GPT),
    "GPTNeoForCausalLM": (
        "gpt_neo",
        {
            "vocab_size": 61,
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 4,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local", "local"], 1]],
            "window_size": 5,
        },
    ),
    "OPTForCausalLM": ("opt", {**_SIZES, "ffn_dim": 40, "word_embed_proj_dim": 32}),
    "GPTJForCausalLM": ("gptj", {**_GPT, "rotary_dim": 4}),
    "GPTNeoXForCausalLM": ("gpt_neox", {**_MLP, "rotary_pct": 0.5}),
    "BloomForCausalLM": (
        "bloom",
        {"vocab_size": 61, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    ),
    "LlamaForCausalLM": ("llama", _GQA),
    "MistralForCausalLM": ("mistral", {**_GQA, "head_dim": 12, "sliding_window": 5}),
    "MixtralForCausalLM": ("mixtral", {**_GQA, **_MOE, "sliding_window": 5}),
    "Qwen2ForCausalLM": ("qwen2", {**_GQA, "rope_theta": 20000.0}),
    "Qwen3ForCausalLM": ("qwen3", {**_GQA, "head_dim": 12}),
    "PhiForCausalLM": ("phi", {**_MLP, "partial_rotary_factor": 0.25}),
    "Phi3ForCausalLM": ("phi3", {**_GQA, "pad_token_id": 0, "sliding_window": 5}),
    "GemmaForCausalLM": ("gemma", {**_GQA, "head_dim": 12, "hidden_act": "gelu"}),
    "Gemma2ForCausalLM": (
        "gemma2",
        {**_GQA, **_MIXED, "head_dim": 12, "query_pre_attn_scalar": 20},
    ),
    "Gemma3ForCausalLM": (
        "gemma3_text",
        {**_GQA, **_MIXED, "head_dim": 12, "query_pre_attn_scalar": 20, "rope_theta": 1e5},
    ),
    "OlmoForCausalLM": ("olmo", {**_MLP, "clip_qkv": 0.3, "rope_theta": 700.0}),
    "Olmo2ForCausalLM": ("olmo2", {**_MLP, "rope_theta": 700.0}),
    "Olmo3ForCausalLM": ("olmo3", {**_GQA, **_MIXED}),
    "OlmoeForCausalLM": (
        "olmoe",
        {**_GQA, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.3},
    ),
    "ApertusForCausalLM": ("apertus", _GQA),
    "GptOssForCausalLM": ("gpt_oss", {**_GQA, **_MOE, **_MIXED, "head_dim": 12}),
}
AVAILABLE = [
    name
    for name, (model_type, _) in ARCHITECTURES.items()
    if name in SUPPORTED_ARCHITECTURES and model_type in CONFIG_MAPPING
]


def make_config(architecture: str, **changes: Any) -> PretrainedConfig:
    """The tiny config of `architecture` with some keywords changed."""
    model_type, keywords = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(model_type, **copy.deepcopy({**keywords, **changes}))
    config.architectures = [architecture]
    return config


def save_config(config: PretrainedConfig, folder: Path, **raw: Any) -> Path:
    """Write `config` as `folder/config.json`, with the keys `raw` on top."""
    config.save_pretrained(folder)
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), "architectures": config.architectures, **raw}
    path.write_text(json.dumps(values))
    return folder


def translate(config: Any, official_name: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """`config_dict` with the arguments that do not matter filled in."""
    return config_dict(
        config, official_name=official_name, tokenizer_name=None, trust_remote_code=False
    )


def complete(fields: dict[str, Any], **changes: Any) -> HookedTransformerConfig:
    """The HookedTransformerConfig that `fields` describe, on the CPU in float32."""
    fixed = {"dtype": torch.float32, "device": "cpu", "init_weights": False}
    return HookedTransformerConfig.from_dict({**fields, **fixed, **changes})


def largest_difference(
    config: PretrainedConfig, tokens: int = 40, n_ctx: int | None = None, **converters: Any
) -> float:
    """How far HookedTransformer's log-probabilities are from Hugging Face's, for random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Eager attention: the fused kernels would hide nothing here but cost their own rounding.
        hf_model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in hf_model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.25)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        ids = torch.randint(1, 60, (2, tokens))
    cfg = complete(translate(config)[0], **({} if n_ctx is None else {"n_ctx": n_ctx}))
    convert = borrow(
        loading.get_pretrained_state_dict, get_official_model_name=lambda name: name, **converters
    )
    model = HookedTransformer(cfg)
    put_rope_tables(model, config)
    model.load_and_process_state_dict(
        convert("checkpoint", cfg, hf_model=hf_model),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    with torch.no_grad():
        expected = hf_model(ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(-1)
        return float((model.eval()(ids).log_softmax(-1) - expected).abs().max())
