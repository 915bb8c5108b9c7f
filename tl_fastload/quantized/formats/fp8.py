"""The format of 8-bit floats with scales, as transformers ("fp8", "fbgemm_fp8") and NVIDIA's
ModelOpt store it: `weight` with `weight_scale_inv` or `weight_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tl_fastload.errors import QuantizationError
from tl_fastload.quantized.formats.base import Format, QuantizedBytes, damaged, describe
from tl_fastload.quantized.formats.scaled_bytes import (
    FLOAT8,
    ScaledBytes,
    scaled_bytes,
    scaled_sample,
)
from tl_fastload.quantized.spec import Spec, modules_in, table_in, unreadable, wrong_setting

_USUAL = (128, 128)
_SCALES = ("weight_scale_inv", "weight_scale")
_STACKED = ("gate_up_proj", "down_proj", "up_proj")
_KNOWN = {"scale_fmt": ("float", "ue8m0"), "fmt": ("e4m3", "e5m2"), "expert_dtype": ("fp8",)}
_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
OF_ACTIVATIONS = frozenset(
    {
        *(".input_scale", ".input_scale_ub", ".activation_scale", ".output_scale"),
        *(".k_scale", ".v_scale", ".q_scale", ".prob_scale", ".kv_scale"),
        *(f".{name}_activation_scale" for name in _STACKED),
    }
)
"""Ends of the names of scales of activations, and of kept keys and values."""


@dataclass(frozen=True)
class ScaledSpec(Spec):
    """How codes with scales are stored.

    Attributes:
        block: (rows, columns) of a block; None for one scale a row, or for the whole matrix.
        is_sure: whether the configuration says which of these it is, and not the scales' shapes.
        rounds: what the checkpoint's runtime rounds besides the weights, in words; empty for
            nothing.
    """

    block: tuple[int, int] | None = None
    is_sure: bool = True
    rounds: str = ""

    def __post_init__(self) -> None:
        if self.block is not None:  # JSON has no tuples
            object.__setattr__(self, "block", tuple(self.block))

    def other_numbers(self) -> str | None:
        if not self.rounds:
            return None
        return (
            f"The {self.kind} checkpoint was made for a runtime that rounds {self.rounds}, too. "
            "Here, as in transformers' dequantized model, only the weights are rounded: next to "
            "that runtime, log-probabilities may differ by 0.1 or more."
        )


@dataclass(frozen=True)
class ZeroPointSpec(ScaledSpec):
    """How codes with scales, and perhaps zero points, are stored.

    Attributes:
        is_symmetric: whether there are no zero points, or stored ones are zeros.
    """

    is_symmetric: bool = True


def rounded_besides(scales: str | None, rounds_cache: bool = False) -> str:
    """What a runtime rounds to 8 bits besides weights, in words.

    Args:
        scales: of activations, "dynamic" or "static"; None if these are not rounded.
        rounds_cache: whether it rounds the keys and values that it keeps.
    """
    parts = [] if scales is None else [f"activations ({scales} scales)"]
    parts += ["the keys and values that it keeps"] if rounds_cache else []
    return " and ".join(parts) + " to 8 bits" if parts else ""


class Fp8(Format):
    """8-bit floats, dequantized at use."""

    name = "FP8"
    kinds = ("fp8",)
    stores = (ScaledBytes,)
    spec = ScaledSpec
    pieces: ClassVar[Mapping[str, str]] = {
        **{f".{scale}": ".weight" for scale in _SCALES},
        **{f".{name}_scale_inv": f".{name}" for name in _STACKED},
    }
    codes = FLOAT8
    ignored = OF_ACTIVATIONS
    remedy = 'pip install --upgrade "torch>=2.1"'
    foreign: ClassVar[Mapping[str, str]] = {
        "FP8Experts": "transformers keeps these experts as 8-bit floats of its own"
    }
    undeclared: ClassVar[Mapping[str, str]] = {
        "weight_scale_inv": '{"quant_method": "fp8", "weight_block_size": [128, 128]}, or null for '
        "the block size",
        "weight_scale": "the one that the checkpoint was saved with (ModelOpt's lies in "
        'hf_quant_config.json: {"quant_method": "modelopt", "quant_algo": "FP8"})',
    }

    def declared(self, fields: Mapping[str, Any]) -> Spec | None:
        method = str(fields.get("quant_method"))
        if method == "fp8":
            return _of_transformers(fields)
        if method == "fbgemm_fp8":
            skip = modules_in(fields, "modules_to_not_convert")
            return ScaledSpec("fp8", skip, rounds=rounded_besides("dynamic"))
        return _of_modelopt(fields) if method.startswith("modelopt") else None

    def assemble(self, pieces: Mapping[str, torch.Tensor], spec: Any) -> QuantizedBytes:
        codes, scales = codes_and_scales(pieces, FLOAT8, "fp8")
        block = spec.block
        if not spec.is_sure and (scales.dim() < 2 or scales.shape[-1] == 1):
            block = None
        return scaled_bytes(codes, scales, block, "fp8")

    def sample(self, kind: str, device: torch.device) -> QuantizedBytes:
        return scaled_sample("float8_e4m3fn", kind, device)

    def of_layer(self, module: Any) -> tuple[QuantizedBytes, torch.dtype | None] | None:
        if type(module).__name__ != "FP8Linear" or module.weight.dtype not in FLOAT8:
            return None
        codes, scales = module.weight.detach(), module.weight_scale_inv.detach()
        return scaled_bytes(codes, scales, as_block(module.block_size), "fp8"), None


def _of_transformers(fields: Mapping[str, Any]) -> ScaledSpec:
    """A `quantization_config` with quant_method fp8."""
    block, is_sure = fields.get("weight_block_size", _USUAL), "weight_block_size" in fields
    scheme = fields.get("activation_scheme") or "dynamic"
    if str(scheme).lower() not in ("dynamic", "static"):
        raise wrong_setting("activation_scheme", scheme, "neither 'dynamic' nor 'static'")
    for name, known in _KNOWN.items():
        value = fields.get(name) or known[0]
        if value not in known:
            raise unreadable(
                f"FP8 weights with {name}={value!r} in quantization_config, which a newer "
                "tl_fastload may know,",
                " and ".join(known),
            )
    skip = modules_in(fields, "modules_to_not_convert", "ignored_layers")
    rounds = rounded_besides(str(scheme).lower())
    return ScaledSpec("fp8", skip, None, as_block(block), is_sure, rounds)


def _of_modelopt(fields: Mapping[str, Any]) -> ScaledSpec:
    """A `quantization_config` of ModelOpt, which may be nested as in hf_quant_config.json."""
    inner = {**fields, **table_in(fields, "quantization")}
    algorithm = inner.get("quant_algo")
    if algorithm not in _MODELOPT:
        raise unreadable(f"ModelOpt's {algorithm} weights", " and ".join(_MODELOPT))
    skip = modules_in(inner, "ignore", "exclude_modules")
    keeps = bool(inner.get("kv_cache_quant_algo") or inner.get("kv_cache_scheme"))
    rounds = rounded_besides("static" if algorithm == "FP8" else "dynamic", keeps)
    return ScaledSpec("fp8", skip, rounds=rounds)


def as_block(value: Any) -> tuple[int, int] | None:
    """A block size as configurations have it.

    Raises:
        ArgumentError: not two positive numbers, and not None.
    """
    if value is None:
        return None
    sizes = list(value) if isinstance(value, (list, tuple)) else []
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise wrong_setting("block size", value, "not a pair of positive numbers, and not null")
    return (sizes[0], sizes[1])


def codes_and_scales(
    pieces: Mapping[str, torch.Tensor], dtypes: Any, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two pieces that every weight needs.

    Args:
        pieces: of one weight, as in `Format.assemble`.
        dtypes: of codes.
        kind: of the weights, for messages.

    Raises:
        QuantizationError: one is missing, or both of two, or codes are of another dtype.
    """
    scales = [name for name in pieces if name.endswith(("_scale", "_scale_inv"))]
    others = [name for name in pieces if name not in scales and not name.endswith("_zero_point")]
    if not others:
        raise QuantizationError(f"the {kind} weight itself is missing beside {scales[0]}.")
    codes = pieces[others[0]]
    if not scales:
        raise damaged(
            f"{kind} weights {describe(codes)} without their scales (weight_scale_inv or "
            "weight_scale)"
        )
    if len(scales) > 1:
        raise QuantizationError(f"{' and '.join(sorted(scales))} are several scales of one weight.")
    if codes.dtype not in dtypes:
        named = " or ".join(sorted(str(dtype) for dtype in dtypes)) or "8-bit floats (torch 2.1)"
        raise QuantizationError(
            f"a weight with {scales[0]} is {named}, not {describe(codes)}. Correct "
            "quantization_config in config.json, or download the checkpoint again."
        )
    return codes, pieces[scales[0]]


def stored_zeros(
    pieces: Mapping[str, torch.Tensor], name: str, is_symmetric: bool
) -> torch.Tensor | None:
    """The zero points of codes; None for zeros, which some versions store.

    Args:
        pieces: of one weight, as in `Format.assemble`.
        name: of the piece that has them.
        is_symmetric: whether the configuration says that there are none.

    Raises:
        QuantizationError: they are missing; or, where values are known, not the zeros that the
            configuration says.
    """
    zeros = pieces.get(name)
    if zeros is None and not is_symmetric:
        raise damaged(f"an asymmetric weight without its zero points ({name})")
    if zeros is not None and is_symmetric and not zeros.is_meta and bool(zeros.any()):
        raise QuantizationError(
            "there are zero points other than zero, and quantization_config describes symmetric "
            "weights. Restore config.json from the checkpoint's repository."
        )
    return None if is_symmetric else zeros
