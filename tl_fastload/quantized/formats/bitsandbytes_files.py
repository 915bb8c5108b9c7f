"""bitsandbytes' bytes from the tensors that transformers saves. Needs no bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from tl_fastload.errors import QuantizationError
from tl_fastload.quantized.formats.base import QuantizedBytes
from tl_fastload.quantized.formats.bitsandbytes_bytes import FourBitBytes, Int8Bytes
from tl_fastload.quantized.formats.bitsandbytes_kernels import full_code
from tl_fastload.quantized.spec import as_dtype

INT8_PARTS = frozenset({"SCB", "weight_format"})
_PLAIN = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATE = "quant_state.bitsandbytes__"
FOUR_BIT_PARTS = frozenset({f"weight.{name}" for name in (*_PLAIN, f"{_STATE}nf4", f"{_STATE}fp4")})
DESCRIPTIONS = frozenset({"weight_format", f"weight.{_STATE}nf4", f"weight.{_STATE}fp4"})
"""The pieces that describe the others: a few bytes each."""

# The one layout of rows that bitsandbytes still has; others were made for particular GPUs.
_ROW_FORMATS = (0, "row")


def read(pieces: Mapping[str, torch.Tensor], threshold: float = 6.0) -> QuantizedBytes:
    """The bytes of one layer, sharing the memory of the tensors given.

    Args:
        pieces: the layer's tensors under their names in the layer: `weight` with `SCB` and perhaps
            `weight_format` (int8), or with `weight.absmax`, `weight.quant_map`,
            `weight.quant_state.bitsandbytes__nf4` and, doubly quantized, `weight.nested_absmax` and
            `weight.nested_quant_map` (4-bit).
        threshold: of outlier activations, from the checkpoint's configuration
            (`llm_int8_threshold`).

    Raises:
        QuantizationError: pieces missing, misshapen, unreadable or of a layout that bitsandbytes
            gave up.
    """
    if "weight" not in pieces:
        raise QuantizationError("the quantized weight itself is missing.")
    if any(piece in FOUR_BIT_PARTS for piece in pieces):
        return _read_4bit(pieces)
    return _read_int8(pieces, threshold)


def _read_int8(pieces: Mapping[str, torch.Tensor], threshold: float) -> Int8Bytes:
    if pieces["weight"].dtype != torch.int8:
        raise QuantizationError(
            f"a quantized weight is int8 with its scales (SCB), or 4-bit with a quant_state, not "
            f"{pieces['weight'].dtype}."
        )
    if "SCB" not in pieces:
        raise QuantizationError(
            "an int8 weight without its scales (SCB). Save the checkpoint again."
        )
    layout: Any = pieces.get("weight_format", "row")
    layout = layout.item() if isinstance(layout, torch.Tensor) else layout
    if layout not in _ROW_FORMATS:
        raise QuantizationError(
            f"int8 weights in layout {layout!r}, which was made for one kind of GPU. Save the "
            f"checkpoint again with "
            "a newer bitsandbytes, which writes rows."
        )
    # Some versions saved the scales as [1, out].
    return Int8Bytes(pieces["weight"].contiguous(), pieces["SCB"].reshape(-1).float(), threshold)


def _read_4bit(pieces: Mapping[str, torch.Tensor]) -> FourBitBytes:
    states = [key for key in pieces if key.startswith(f"weight.{_STATE}")]
    if len(states) != 1:
        raise QuantizationError(
            f"4-bit weights need exactly one weight.{_STATE}nf4 or ...fp4, not {states or 'none'}."
        )
    options = _options(pieces[states[0]])
    is_nested = "nested_blocksize" in options
    wanted = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if is_nested else [])]
    missing = [key for key in wanted if f"weight.{key}" not in pieces]
    if missing:
        raise QuantizationError(
            f"4-bit weights without {', '.join(f'weight.{k}' for k in missing)}."
        )
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
            code=full_code(pieces["weight.quant_map"], str(options["quant_type"])),
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


def _options(state: torch.Tensor) -> dict[str, Any]:
    """The JSON that bitsandbytes packs into a tensor of bytes."""
    try:
        options = json.loads(bytes(state.cpu().tolist()).decode("utf-8"))
    except (ValueError, TypeError) as error:
        raise QuantizationError(f"the quant_state is not readable ({error}).") from error
    if not isinstance(options, dict):
        raise QuantizationError("the quant_state is not a table.")
    return options
