"""Which model classes HookedTransformer can represent, and what to say of the others."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformer_lens import loading_from_pretrained as loading
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from tl_fastload.errors import UnsupportedArchitectureError
from tl_fastload.ground import compat
from tl_fastload.ground.borrow import innermost, spelled_out
from tl_fastload.ground.compat import TRANSFORMER_LENS

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


def declared_architectures(value: Any) -> list[str]:
    """The entries of an `architectures` field, which may be missing or a bare string."""
    return [value] if isinstance(value, str) else [str(name) for name in value or ()]


def architecture_of(hf_config: Any) -> str:
    """The name of the causal language model class that `hf_config` describes.

    A config of a base model (`GPT2Model`), or one without `architectures`, is taken for the
    language model of its model type.

    Raises UnsupportedArchitectureError when HookedTransformer cannot represent that class.
    """
    names = declared_architectures(getattr(hf_config, "architectures", None))
    model_type = str(getattr(hf_config, "model_type", "") or "")
    by_lower = {name.lower(): name for name in SUPPORTED_ARCHITECTURES}
    for name in names:
        if name.lower() in by_lower:  # early Llama checkpoints say "LLaMAForCausalLM"
            return by_lower[name.lower()]
    name = names[0] if names else ""
    base = MODEL_MAPPING_NAMES.get(model_type, "")
    if not names or name == base or (isinstance(base, tuple) and name in base):
        causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
        if causal in SUPPORTED_ARCHITECTURES:
            return str(causal)
    is_seq2seq = bool(getattr(hf_config, "is_encoder_decoder", False))
    raise _unsupported(name, model_type, is_seq2seq)


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


def text_config(hf_config: Any) -> Any:
    """The part of a configuration that describes the language model: of a multimodal one, its
    `text_config`.
    """
    return getattr(hf_config, "text_config", None) or hf_config


def parts_of(hf_config: Any) -> list[Any]:
    """A configuration and those inside it: of a multimodal model, one for each of its parts.

    transformers sets some things on all of them (dtype, attention) and reads others off whichever
    has them.
    """
    inner = [value for value in vars(hf_config).values() if isinstance(value, PretrainedConfig)]
    return [hf_config, *(part for config in inner for part in parts_of(config))]


def declared_dtype(hf_config: Any) -> torch.dtype | None:
    """The dtype that a configuration names for its language model, if it does."""
    for config in (text_config(hf_config), hf_config):
        dtype = getattr(config, compat.CONFIG_DTYPE_NAME, None)
        if isinstance(dtype, torch.dtype):
            return dtype
    return None


def declared_quantization(hf_config: Any) -> Any:
    """The `quantization_config` of a model: its own, else that of its language model."""
    for config in (hf_config, text_config(hf_config)):
        found = getattr(config, "quantization_config", None)
        if found is not None:
            return found
    return None


def for_an_empty_model(hf_config: Any, dtype: torch.dtype | None) -> Any:
    """A copy of a configuration from which transformers builds a plain model.

    Args:
        hf_config: not changed.
        dtype: what the configuration says of it, which some modules make their parameters in. Those
            inside it say nothing: transformers makes each part that names a dtype under another
            default dtype, for all threads.
    """
    copied = copy.deepcopy(hf_config)
    for config in parts_of(copied):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        setattr(config, compat.CONFIG_DTYPE_NAME, dtype if config is copied else None)
        config._attn_implementation = "eager"
    return copied
