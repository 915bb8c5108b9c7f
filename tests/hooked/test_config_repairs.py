"""Corrections of what TransformerLens leaves out, and refusals of what it cannot compute."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
from transformer_lens import loading_from_pretrained as loading
from transformers import CONFIG_MAPPING

from tests.support.tiny_configs import AVAILABLE, largest_difference, make_config, translate
from tl_fastload.errors import NumbersWarning, UnsupportedArchitectureError
from tl_fastload.hooked.config_repairs import differences

_SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
_MIXED = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}

CORRECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "n_inner of gpt2": ("GPT2LMHeadModel", {"n_inner": 44}),
    "scaled by layer": ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}),
    "unscaled": ("GPT2LMHeadModel", {"scale_attn_weights": False}),
    "other name of gelu": ("GPT2LMHeadModel", {"activation_function": "gelu_python"}),
    "other name of gelu_new": ("GPT2LMHeadModel", {"activation_function": "gelu_accurate"}),
    "other name of silu": ("LlamaForCausalLM", {"hidden_act": "swish"}),
    "n_inner of gptj": ("GPTJForCausalLM", {"n_inner": 44}),
    "epsilon of gptj": ("GPTJForCausalLM", {"layer_norm_epsilon": 1e-2}),
    "intermediate_size of gpt_neo": ("GPTNeoForCausalLM", {"intermediate_size": 44}),
    "sequential neox": ("GPTNeoXForCausalLM", {"use_parallel_residual": False}),
    "head_dim of llama": ("LlamaForCausalLM", {"head_dim": 12}),
    "head_dim of mixtral": ("MixtralForCausalLM", {"head_dim": 12}),
    "window of mixtral": ("MixtralForCausalLM", {"sliding_window": 4}),
    "window of phi3": ("Phi3ForCausalLM", {"sliding_window": 4}),
    "no window of mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "windows of qwen2": ("Qwen2ForCausalLM", _SLIDING),
    "windows of qwen3": ("Qwen3ForCausalLM", _SLIDING),
    "windows by layer_types": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, **_MIXED},
    ),
    "no windows of gpt-oss": ("GptOssForCausalLM", {"layer_types": ["full_attention"] * 3}),
    "biases of gpt-oss": ("GptOssForCausalLM", {"attention_bias": False}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "no grouping": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "soft caps of gemma2": (
        "Gemma2ForCausalLM",
        {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    ),
    "no soft caps of gemma2": (
        "Gemma2ForCausalLM",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "soft caps of gemma3": ("Gemma3ForCausalLM", {"final_logit_softcapping": 4.0}),
    "layers of gemma3": ("Gemma3ForCausalLM", {"layer_types": None, "sliding_window_pattern": 2}),
    "no clipping of olmo": ("OlmoForCausalLM", {"clip_qkv": None}),
    "renormed experts": ("OlmoeForCausalLM", {"norm_topk_prob": True}),
}


def _make(architecture: str, keywords: dict[str, Any]) -> Any:
    if architecture not in AVAILABLE:
        pytest.skip(f"this TransformerLens has no {architecture}")
    return make_config(architecture, **keywords)


@pytest.mark.parametrize("case", CORRECTED)
def test_corrected(case: str) -> None:
    assert largest_difference(_make(*CORRECTED[case])) < 1e-4


def test_grouped_heads_of_olmo_2() -> None:
    config = _make("Olmo2ForCausalLM", {"num_key_value_heads": 2})
    fields, _ = translate(config)
    assert fields["n_key_value_heads"] == 2
    # The converter of OLMo 2 cannot split grouped heads; that of OLMo 3, the same block, can.
    difference = largest_difference(config, convert_olmo2_weights=loading.convert_olmo3_weights)
    assert difference < 1e-4


@pytest.mark.skipif("ministral" not in CONFIG_MAPPING, reason="transformers has no Ministral")
def test_a_mistral_with_layer_types_is_a_ministral() -> None:
    keywords = {"sliding_window": 5, "num_hidden_layers": 3, **_MIXED}
    config = CONFIG_MAPPING["ministral"](**keywords, architectures=["MistralForCausalLM"])
    assert translate(config)[0]["attn_types"] == ["global", "local", "global"]
    mistral = _make("MistralForCausalLM", keywords)
    assert translate(mistral)[0]["attn_types"] == ["local"] * 3


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "cross": ("GPT2LMHeadModel", {"add_cross_attention": True}, "add_cross_attention"),
    "bloom": (
        "BloomForCausalLM",
        {"apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm",
    ),
    "post-norm opt": ("OPTForCausalLM", {"do_layer_norm_before": False}, "do_layer_norm_before"),
    "projected opt": ("OPTForCausalLM", {"word_embed_proj_dim": 16}, "word_embed_proj_dim"),
    "opt without biases": ("OPTForCausalLM", {"enable_bias": False}, "enable_bias"),
    "neox without biases": ("GPTNeoXForCausalLM", {"attention_bias": False}, "attention_bias"),
    "normed phi": ("PhiForCausalLM", {"qk_layernorm": True}, "qk_layernorm"),
    "grouped phi": ("PhiForCausalLM", {"num_key_value_heads": 2}, "num_key_value_heads"),
    "grouped olmo": ("OlmoForCausalLM", {"num_key_value_heads": 2}, "num_key_value_heads"),
    "wide heads": ("Olmo2ForCausalLM", {"head_dim": 12}, "head_dim"),
    "swiglu": ("GptOssForCausalLM", {"swiglu_limit": 0.5}, "swiglu_limit"),
    "both directions": ("GemmaForCausalLM", {"use_bidirectional_attention": True}, "directions"),
    "activation": ("LlamaForCausalLM", {"hidden_act": "quick_gelu"}, "'quick_gelu'.*silu"),
    "odd rotary": ("GPTNeoXForCausalLM", {"rotary_pct": 0.4}, "rotates 3 of the 8"),
    "layers": (
        "Olmo3ForCausalLM",
        {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
        "chunked_attention",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    architecture, keywords, words = REFUSED[case]
    config = _make(architecture, keywords)
    with pytest.raises(UnsupportedArchitectureError, match=words) as error:
        translate(config)
    assert architecture in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "keywords", "words"),
    [
        ("LlamaForCausalLM", {"attention_bias": True}, "sets attention_bias"),
        ("LlamaForCausalLM", {"mlp_bias": True}, "sets mlp_bias"),
        ("Qwen3ForCausalLM", {"attention_bias": True}, "sets attention_bias"),
        ("GemmaForCausalLM", {"attention_bias": True}, "sets attention_bias"),
        ("BloomForCausalLM", {"n_head": 5, "hidden_size": 40}, "5 heads"),
    ],
)
def test_other_numbers_than_those_of_hugging_face_are_warned_of(
    architecture: str, keywords: dict[str, Any], words: str
) -> None:
    config = _make(architecture, keywords)
    with pytest.warns(NumbersWarning, match=words) as warned:
        (note,) = differences(translate(config)[0], config)
    assert note == str(warned[0].message)
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("architecture", "keywords", "words"),
    [
        ("MistralForCausalLM", {"max_position_embeddings": 4096}, "2048 .*made for 4096"),
        ("Gemma3ForCausalLM", {"max_position_embeddings": 9000}, "8192 .*made for 9000"),
    ],
)
def test_noted(architecture: str, keywords: dict[str, Any], words: str) -> None:
    (note,) = translate(_make(architecture, keywords))[1]
    assert re.search(words, note)


@pytest.mark.parametrize("architecture", AVAILABLE)
def test_nothing_is_noted_where_all_is_as_hugging_face_has_it(architecture: str) -> None:
    config = make_config(architecture)
    fields, notes = translate(config)
    assert notes == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumbersWarning)
        assert differences(fields, config) == []
