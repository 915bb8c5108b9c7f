"""Which model classes HookedTransformer can represent, and what to say of the others."""

from __future__ import annotations

import difflib

from transformer_lens import loading_from_pretrained as loading
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from tl_fastload.ground.borrow import innermost, spelled_out
from tl_fastload.ground.compat import TRANSFORMER_LENS
from tl_fastload.hooked.toy import is_toy
from tl_fastload.huggingface.config import Supported

_DECODERS = (
    "ApertusForCausalLM",
    "BloomForCausalLM",
    "GPT2LMHeadCustomModel",
    "GPT2LMHeadModel",
    "GPTJForCausalLM",
    "GPTNeoForCausalLM",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "GemmaForCausalLM",
    "GptOssForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "OPTForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "OlmoForCausalLM",
    "OlmoeForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "QWenLMHeadModel",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)


def converted() -> tuple[str, ...]:
    """The decoders that TransformerLens' function compares an architecture's name with."""
    function = innermost(loading.get_pretrained_state_dict)
    compared = spelled_out(function.__code__) if function is not None else frozenset()
    # Something else stands there if it names none: the load says so, which a list cannot.
    return tuple(name for name in _DECODERS if name in compared) or _DECODERS


SUPPORTED_ARCHITECTURES: tuple[str, ...] = converted()
"""Decoders whose weights the installed TransformerLens converts."""


def _reason(name: str, model_type: str, is_seq2seq: bool) -> str:
    if model_type == "t5" or name.startswith("T5"):
        return "is an encoder-decoder: TransformerLens' class for it is HookedEncoderDecoder."
    if is_seq2seq:
        return "is an encoder-decoder (TransformerLens' HookedEncoderDecoder serves T5 only)."
    if model_type == "bert" or name.startswith("Bert"):
        return "is an encoder: TransformerLens' class for it is HookedEncoder."
    if model_type in ("hubert", "wav2vec2") or name.startswith(("Hubert", "Wav2Vec2")):
        return "is an audio encoder: TransformerLens' class for it is HookedAudioEncoder."
    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return "is an encoder (TransformerLens' HookedEncoder serves BERT only)."
    if name in _DECODERS:
        return f"needs a newer TransformerLens than the installed {TRANSFORMER_LENS}."
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if causal in SUPPORTED_ARCHITECTURES:
        return f"is not the language model of its family, which is {causal}."
    close = difflib.get_close_matches(name, SUPPORTED_ARCHITECTURES, n=3, cutoff=0.85)
    nearest = f" The nearest that it can: {', '.join(close)}." if close else ""
    return f"is not an architecture that HookedTransformer can represent.{nearest}"


SUPPORTED = Supported(SUPPORTED_ARCHITECTURES, _reason, is_toy)
"""What HookedTransformer can represent."""
