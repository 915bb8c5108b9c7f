"""Which model classes HookedTransformer can represent, and what to say of the others."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformer_lens import loading_from_pretrained as loading
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from tl_fastload.errors import UnsupportedArchitectureError
from tl_fastload.ground.borrow import innermost, spelled_out
from tl_fastload.ground.compat import TRANSFORMER_LENS
from tl_fastload.ground.hf_configs import declared_architectures
from tl_fastload.huggingface.config import causal_class_of

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


def architecture_of(hf_config: Any) -> str:
    """The name of the causal language model class that `hf_config` describes.

    A config of a base model (`GPT2Model`), or one without `architectures`, is taken for the
    language model of its model type.

    Raises UnsupportedArchitectureError when HookedTransformer cannot represent that class.
    """
    found = causal_class_of(hf_config, SUPPORTED_ARCHITECTURES)
    if found is not None:
        return found
    names = declared_architectures(getattr(hf_config, "architectures", None))
    model_type = str(getattr(hf_config, "model_type", "") or "")
    is_seq2seq = bool(getattr(hf_config, "is_encoder_decoder", False))
    raise _unsupported(names[0] if names else "", model_type, is_seq2seq)


def unsupported_json(folder: Path, raw: Mapping[str, Any]) -> UnsupportedArchitectureError:
    """The error for a config.json of a model type that transformers does not know."""
    names = declared_architectures(raw.get("architectures"))
    if names:
        return _unsupported(names[0], str(raw.get("model_type", "")), is_seq2seq=False)
    return UnsupportedArchitectureError(
        f"{folder / 'config.json'} names neither `architectures` nor a `model_type` that "
        f"transformers knows (model_type: {raw.get('model_type')!r}), so it does not say what "
        f'model this is. Add `architectures`, for instance ["LlamaForCausalLM"]. {supported_list()}'
    )


def supported_list() -> str:
    """One sentence that names every supported architecture."""
    return f"Supported: {', '.join(SUPPORTED_ARCHITECTURES)}."


def _unsupported(name: str, model_type: str, is_seq2seq: bool) -> UnsupportedArchitectureError:
    what = name or f"A config of model type {model_type!r} without `architectures`"
    return UnsupportedArchitectureError(
        f"{what} {_reason(name, model_type, is_seq2seq)} {supported_list()}"
    )


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
