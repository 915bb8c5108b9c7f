"""What kind of quantization is meant: arguments and configurations, read into one form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tl_fastload.config_architectures import declared_quantization
from tl_fastload.errors import ArgumentError, UnsupportedArchitectureError

_SHORT = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {"8bit": "int8", "int8": "int8", "nf4": "nf4", "4bit": "nf4", "fp4": "fp4"}
_BITSANDBYTES = ("bitsandbytes", "bitsandbytes_8bit", "bitsandbytes_4bit")


@dataclass(frozen=True)
class Quantization:
    """How matrices are quantized.

    Attributes:
        kind: "int8", "nf4" or "fp4".
        blocksize: values per block of the 4-bit kinds.
        double_quant: whether the scales of the 4-bit kinds are quantized too.
        compute_dtype: what a 4-bit kernel multiplies in; None for the activations' dtype.
        threshold: activations from here on are outliers to the 8-bit kernel.
        skip: names of modules (parts of dotted names) that stay as they are.
    """

    kind: str
    blocksize: int = 64
    double_quant: bool = False
    compute_dtype: torch.dtype | None = None
    threshold: float = 6.0
    skip: tuple[str, ...] = ()


def read_quantization(asked: Any) -> Quantization | None:
    """Read `quantize=` or `quantization_config=`.

    Args:
        asked: None, "8bit", "nf4", "fp4", a `transformers.BitsAndBytesConfig`, or its dictionary.

    Raises:
        ArgumentError: for anything else.
    """
    if asked is None or asked is False:
        return None
    if isinstance(asked, str):
        if asked not in _NAMES:
            raise ArgumentError(f"quantize={asked!r} is none of {', '.join(_NAMES)}.")
        return Quantization(_NAMES[asked])
    fields = asked if isinstance(asked, Mapping) else getattr(asked, "to_dict", dict)()
    if fields.get("load_in_8bit") and fields.get("load_in_4bit"):
        raise ArgumentError("load_in_8bit and load_in_4bit contradict each other: pass one.")
    if fields.get("load_in_8bit"):
        return Quantization(
            "int8",
            threshold=float(fields.get("llm_int8_threshold", 6.0)),
            skip=tuple(fields.get("llm_int8_skip_modules") or ()),
        )
    if fields.get("load_in_4bit"):
        kind = fields.get("bnb_4bit_quant_type", "fp4")
        if kind not in ("nf4", "fp4"):
            raise ArgumentError(f"bnb_4bit_quant_type={kind!r} is neither 'nf4' nor 'fp4'.")
        return Quantization(
            kind,
            double_quant=bool(fields.get("bnb_4bit_use_double_quant", False)),
            compute_dtype=_dtype_or_none(fields.get("bnb_4bit_compute_dtype")),
            skip=tuple(fields.get("llm_int8_skip_modules") or ()),
        )
    raise ArgumentError(
        f"{asked!r} says neither load_in_8bit nor load_in_4bit. Pass "
        '"8bit", "nf4", "fp4" or a BitsAndBytesConfig.'
    )


def quantization_argument(quantize: Any, keywords: dict[str, Any]) -> Any:
    """What is asked for by `quantize=`, or by transformers' older arguments among the keywords.

    Args:
        quantize: the argument of that name.
        keywords: for Hugging Face; `load_in_8bit`, `load_in_4bit` and `quantization_config` are
            taken out.

    Raises:
        ArgumentError: several of them at once.
    """
    found = {"quantize": quantize, "quantization_config": keywords.pop("quantization_config", None)}
    for name, kind in (("load_in_8bit", "8bit"), ("load_in_4bit", "fp4")):
        found[name] = kind if keywords.pop(name, False) else None
    given = {name: value for name, value in found.items() if value is not None}
    if len(given) > 1:
        raise ArgumentError(f"{' and '.join(given)} are several ways to say one thing: pass one.")
    return next(iter(given.values()), None)


def of_checkpoint(hf_config: Any, label: str) -> Quantization | None:
    """The quantization that a checkpoint's configuration declares, or None.

    Raises:
        UnsupportedArchitectureError: for a method other than bitsandbytes.
    """
    method = method_of(hf_config)
    if method is None:
        return None
    if method in _BITSANDBYTES:
        return read_quantization(_declared(hf_config))
    raise UnsupportedArchitectureError(
        f"{label} is quantized with {method}, whose bytes HookedTransformer cannot compute with. "
        "Pass dequantize=True to load it through transformers' own dequantization, or take the "
        "unquantized checkpoint with quantize=."
    )


def method_of(hf_config: Any) -> str | None:
    """The method that a configuration says its weights are quantized with, such as "gptq"."""
    fields = _declared(hf_config)
    if fields is None:
        return None
    method = fields.get("quant_method")
    if method is None:
        return "bitsandbytes" if _is_bitsandbytes(fields) else "an unnamed method"
    return str(getattr(method, "value", method))


def _declared(hf_config: Any) -> Mapping[str, Any] | None:
    declared = declared_quantization(hf_config)
    if declared is None or isinstance(declared, Mapping):
        return declared
    fields: Mapping[str, Any] = declared.to_dict()
    return fields


def _is_bitsandbytes(fields: Mapping[str, Any]) -> bool:
    return bool(fields.get("load_in_8bit") or fields.get("load_in_4bit"))


def _dtype_or_none(value: Any) -> torch.dtype | None:
    return None if value is None else as_dtype(value)


def as_dtype(value: str | torch.dtype) -> torch.dtype:
    """A dtype, or the name of one, as a dtype.

    Raises:
        ArgumentError: torch has no such dtype.
    """
    dtype = _SHORT.get(str(value)) or getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"{value!r} is not a dtype of torch.")
    return dtype
