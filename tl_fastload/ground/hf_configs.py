"""What a Hugging Face configuration says of the model, whichever of its parts says it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from tl_fastload.ground import compat


def declared_architectures(value: Any) -> list[str]:
    """The entries of an `architectures` field, which may be missing or a bare string."""
    return [value] if isinstance(value, str) else [str(name) for name in value or ()]


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
    configs = (text_config(hf_config), hf_config)
    named = (getattr(config, compat.CONFIG_DTYPE_NAME, None) for config in configs)
    return next((dtype for dtype in named if isinstance(dtype, torch.dtype)), None)


def declared_quantization(hf_config: Any) -> Any:
    """The `quantization_config` of a model: its own, else that of its language model."""
    found = getattr(hf_config, "quantization_config", None)
    return getattr(text_config(hf_config), "quantization_config", None) if found is None else found
