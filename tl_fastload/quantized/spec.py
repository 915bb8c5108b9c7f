"""How matrices are quantized: what arguments and configurations say, in one form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tl_fastload.errors import ArgumentError, UnsupportedArchitectureError, warn_numbers
from tl_fastload.ground.hf_configs import declared_quantization

_SHORT = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Spec:
    """How matrices are quantized. A format with settings of its own adds fields to it.

    Attributes:
        kind: such as "int8"; belongs to one format.
        skip: names of modules (parts of dotted names) that stay as they are.
        compute_dtype: what a kernel multiplies in, where it has a choice; None for the
            activations' dtype.
    """

    kind: str
    skip: tuple[str, ...] = ()
    compute_dtype: torch.dtype | None = None

    def why_dense(self, columns: int) -> str | None:
        """Why a matrix with rows of that many values is not quantized; None if it is."""
        return None

    def other_numbers(self) -> str | None:
        """What the runtime that the checkpoint was made for rounds, and is not rounded here; None
        if that is nothing.
        """
        return None


def warn_of_runtime(spec: Spec | None) -> list[str]:
    """Warn of what the runtime of a quantized checkpoint rounds besides its weights; the warning as
    a note, if there is one.
    """
    reason = None if spec is None else spec.other_numbers()
    return [] if reason is None else [warn_numbers(reason)]


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
    for name in ("load_in_8bit", "load_in_4bit"):
        found[name] = {name: True} if keywords.pop(name, False) else None
    given = {name: value for name, value in found.items() if value is not None}
    if len(given) > 1:
        raise ArgumentError(f"{' and '.join(given)} are several ways to say one thing: pass one.")
    return next(iter(given.values()), None)


def declared_fields(hf_config: Any) -> Mapping[str, Any] | None:
    """The `quantization_config` of a Hugging Face configuration as a table, of its enumerations the
    values; None without.
    """
    declared = declared_quantization(hf_config)
    if declared is None:
        return None
    fields = declared if isinstance(declared, Mapping) else declared.to_dict()
    return {name: getattr(value, "value", value) for name, value in fields.items()}


def table_in(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table inside of a `quantization_config`, empty if it is not there.

    Raises:
        ArgumentError: it is something else.
    """
    value = fields.get(name) or {}
    if not isinstance(value, Mapping):
        raise wrong_setting(name, value, "no table")
    return value


def modules_in(fields: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """The modules that a `quantization_config` lists under the first of some names that is there.

    Raises:
        ArgumentError: that is no list of names.
    """
    name = next((name for name in names if fields.get(name)), names[0])
    value = fields.get(name) or ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
        raise wrong_setting(name, value, "no list of modules")
    return tuple(value)


def unreadable(what: str, only: str = "") -> UnsupportedArchitectureError:
    """The error for weights that are not read here.

    Args:
        what: these weights, in words.
        only: what is read of the kind.
    """
    return UnsupportedArchitectureError(
        f"{what} cannot be read{only and f', only {only}'}. Take another quantization, or the "
        "unquantized checkpoint, with quantize= if it is too large."
    )


def wrong_setting(name: str, value: Any, what: str) -> ArgumentError:
    """The error for a setting in a `quantization_config` with a value that is `what`, in words."""
    return ArgumentError(
        f"{name}={value!r} in quantization_config is {what}. Correct config.json, or restore it "
        "from the checkpoint's repository."
    )


def as_dtype(value: str | torch.dtype) -> torch.dtype:
    """A dtype, or the name of one, as a dtype.

    Raises:
        ArgumentError: torch has no such dtype.
    """
    dtype = _SHORT.get(str(value)) or getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"{value!r} is not a dtype of torch.")
    return dtype
