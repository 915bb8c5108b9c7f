"""The format of bitsandbytes: int8 rows ("int8") and packed 4-bit blocks ("nf4", "fp4"). Files are
read without bitsandbytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tl_fastload.errors import ArgumentError, QuantizationError
from tl_fastload.quantized.formats import bitsandbytes_kernels as kernels
from tl_fastload.quantized.formats.base import Format, QuantizedBytes, damaged
from tl_fastload.quantized.formats.bitsandbytes_bytes import FourBitBytes, Int8Bytes
from tl_fastload.quantized.spec import Spec, as_dtype, modules_in

_METHODS = ("bitsandbytes", "bitsandbytes_8bit", "bitsandbytes_4bit")
# What stands beside `weight`: of int8; of 4 bits (`nested_*` if doubly quantized).
INT8_PARTS = frozenset({"SCB", "weight_format"})
_PLAIN = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATE = "quant_state.bitsandbytes__"
FOUR_BIT_PARTS = frozenset({f"weight.{name}" for name in (*_PLAIN, f"{_STATE}nf4", f"{_STATE}fp4")})

# The one layout of rows that bitsandbytes still has; others were made for particular GPUs.
_ROW_FORMATS = (0, "row")
_DECLARED = '{"quant_method": "bitsandbytes", '


@dataclass(frozen=True)
class BitsAndBytesSpec(Spec):
    """How bitsandbytes quantizes.

    Attributes:
        kind: "int8", "nf4" or "fp4".
        blocksize: values per block of the 4-bit kinds.
        double_quant: whether the scales of the 4-bit kinds are quantized too.
        threshold: activations from here on are outliers to the 8-bit kernel.
    """

    blocksize: int = 64
    double_quant: bool = False
    threshold: float = 6.0

    def why_dense(self, columns: int) -> str | None:
        if self.kind == "int8" or columns % self.blocksize == 0:
            return None
        return f"a row of {columns} is not a whole number of blocks of {self.blocksize}"


class BitsAndBytes(Format):
    """What bitsandbytes quantizes, and transformers saves."""

    name = "bitsandbytes"
    kinds = ("int8", "nf4", "fp4")
    stores = (Int8Bytes, FourBitBytes)
    spec = BitsAndBytesSpec
    pieces: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (f".{piece}" for piece in (*INT8_PARTS, *FOUR_BIT_PARTS)), ".weight"
    )
    codes = frozenset({torch.int8, torch.uint8})
    descriptions = frozenset({"weight_format", f"weight.{_STATE}nf4", f"weight.{_STATE}fp4"})
    undeclared: ClassVar[Mapping[str, str]] = {
        "SCB": _DECLARED + '"load_in_8bit": true}',
        **{
            f"weight.quant_state.bitsandbytes__{kind}": _DECLARED
            + f'"load_in_4bit": true, "bnb_4bit_quant_type": "{kind}"}}'
            for kind in ("nf4", "fp4")
        },
    }
    offered: ClassVar[Mapping[str, str]] = {
        "8bit": "int8",
        "int8": "int8",
        "nf4": "nf4",
        "4bit": "nf4",
        "fp4": "fp4",
    }
    advised = ("8bit", "nf4")
    remedy = 'pip install --upgrade "bitsandbytes>=0.46"'

    def declared(self, fields: Mapping[str, Any]) -> Spec | None:
        method = fields.get("quant_method")
        if method is None:
            return self.asked(fields)
        if method not in _METHODS:
            return None
        spec = self.asked(fields)
        if spec is None:
            raise ArgumentError(
                f"the quantization_config {dict(fields)} says neither load_in_8bit nor "
                "load_in_4bit. Correct config.json."
            )
        return spec

    def asked(self, fields: Mapping[str, Any]) -> Spec | None:
        skip = modules_in(fields, "llm_int8_skip_modules")
        if fields.get("load_in_8bit") and fields.get("load_in_4bit"):
            raise ArgumentError("load_in_8bit and load_in_4bit contradict each other: pass one.")
        if fields.get("load_in_8bit"):
            threshold = fields.get("llm_int8_threshold", 6.0)
            if type(threshold) not in (int, float):
                raise ArgumentError(f"llm_int8_threshold={threshold!r} is no number.")
            return BitsAndBytesSpec("int8", skip, threshold=float(threshold))
        if not fields.get("load_in_4bit"):
            return None
        kind = fields.get("bnb_4bit_quant_type", "fp4")
        if kind not in ("nf4", "fp4"):
            raise ArgumentError(f"bnb_4bit_quant_type={kind!r} is neither 'nf4' nor 'fp4'.")
        dtype = fields.get("bnb_4bit_compute_dtype")
        return BitsAndBytesSpec(
            kind,
            skip,
            compute_dtype=None if dtype is None else as_dtype(dtype),
            double_quant=bool(fields.get("bnb_4bit_use_double_quant", False)),
        )

    def assemble(self, pieces: Mapping[str, torch.Tensor], spec: Any) -> QuantizedBytes:
        if "weight" not in pieces:
            raise QuantizationError("the quantized weight itself is missing.")
        if pieces.keys() & FOUR_BIT_PARTS:
            return _read_4bit(pieces)
        return _read_int8(pieces, spec.threshold)

    def of_layer(self, module: Any) -> tuple[QuantizedBytes, torch.dtype | None] | None:
        # By name: a model without such layers must not import bitsandbytes.
        kind = type(module._parameters.get("weight")).__name__
        if kind == "Int8Params":
            return Int8Bytes(*kernels.parts_of_linear8bit(module)), None
        if kind == "Params4bit":
            stored = FourBitBytes(**kernels.parts_of_linear4bit(module))
            dtype = getattr(module, "compute_dtype", None)  # None where it follows its input
            return stored, dtype if isinstance(dtype, torch.dtype) else None
        return None

    def quantize(self, dense: torch.Tensor, spec: Any) -> QuantizedBytes:
        if spec.kind == "int8":
            return Int8Bytes.quantize(dense, spec.threshold)
        return FourBitBytes.quantize(dense, spec.kind, spec.blocksize, spec.double_quant)

    def require_device(self, device: torch.device) -> None:
        kernels.require_device(device)


def _read_int8(pieces: Mapping[str, torch.Tensor], threshold: float) -> Int8Bytes:
    if pieces["weight"].dtype != torch.int8:
        raise QuantizationError(
            f"a quantized weight is int8 with its scales (SCB), or 4-bit with a quant_state, not "
            f"{pieces['weight'].dtype}."
        )
    if "SCB" not in pieces:
        raise damaged("an int8 weight without its scales (SCB)")
    layout: Any = pieces.get("weight_format", "row")
    layout = layout.item() if isinstance(layout, torch.Tensor) else layout
    if layout not in _ROW_FORMATS:
        raise QuantizationError(
            f"int8 weights in layout {layout!r}, which was made for one kind of GPU. Save the "
            "checkpoint again with a newer bitsandbytes, which writes rows."
        )
    # Some versions saved the scales as [1, out].
    return Int8Bytes(pieces["weight"].contiguous(), pieces["SCB"].reshape(-1).float(), threshold)


def _read_4bit(pieces: Mapping[str, torch.Tensor]) -> FourBitBytes:
    states = [key for key in pieces if key.startswith(f"weight.{_STATE}")]
    if len(states) != 1:
        raise QuantizationError(
            f"4-bit weights need exactly one weight.{_STATE}nf4 or ...fp4, not {states or 'none'}."
        )
    try:
        options = json.loads(bytes(pieces[states[0]].cpu().tolist()).decode("utf-8"))
    except (ValueError, TypeError) as error:
        raise QuantizationError(f"the quant_state is not readable ({error}).") from error
    if not isinstance(options, dict):
        raise QuantizationError("the quant_state is not a table.")
    is_nested = "nested_blocksize" in options
    wanted = [f"weight.{name}" for name in (_PLAIN if is_nested else _PLAIN[:2])]
    missing = [name for name in wanted if name not in pieces]
    if missing:
        raise QuantizationError(f"4-bit weights without {', '.join(missing)}.")
    try:
        nested: dict[str, Any] = {}
        if is_nested:
            absmax = pieces["weight.nested_absmax"]
            nested = {
                "nested_absmax": absmax.reshape(-1),
                "nested_code": pieces["weight.nested_quant_map"],
                "nested_offset": torch.tensor(
                    float(options["nested_offset"]), dtype=torch.float32, device=absmax.device
                ),
                "nested_blocksize": int(options["nested_blocksize"]),
            }
        out, columns = (int(size) for size in options["shape"])
        return FourBitBytes(
            packed=pieces["weight"].contiguous().reshape(-1).view(torch.uint8).reshape(-1, 1),
            absmax=pieces["weight.absmax"].reshape(-1),
            code=kernels.full_code(pieces["weight.quant_map"], str(options["quant_type"])),
            shape=(out, columns),
            blocksize=int(options["blocksize"]),
            quant_type=str(options["quant_type"]),
            quant_dtype=as_dtype(str(options["dtype"])),
            **nested,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise QuantizationError(
            f"{states[0]} does not describe 4-bit weights ({type(error).__name__}: {error})."
        ) from error
