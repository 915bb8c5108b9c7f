"""The format of gpt-oss as published: experts as 4-bit floats in blocks of 32 that share a power of
two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from tl_fastload.errors import QuantizationError
from tl_fastload.quantized.formats.base import Format, QuantizedBytes, damaged, describe
from tl_fastload.quantized.formats.decoded import DecodedBytes
from tl_fastload.quantized.formats.scaled_bytes import looked_up, pairs_of, scale_values
from tl_fastload.quantized.spec import Spec, modules_in

BLOCK = 32
_PIECES = ("_blocks", "_scales")
# By code: a sign, two bits of exponent, one of mantissa (OCP's E2M1).
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_pairs = partial(pairs_of, [*_VALUES, *(-value for value in _VALUES)])


@dataclass(frozen=True, eq=False)
class Mxfp4Bytes(DecodedBytes):
    """Rows of 4-bit floats, two a byte, the first in the low half, times 2^(scale - 127).

    Attributes:
        packed: [out, in / 2] uint8.
        scales: [out, in / 32] uint8.
    """

    packed: torch.Tensor
    scales: torch.Tensor

    tag = kind = "mxfp4"

    def __post_init__(self) -> None:
        rows, halves = self.packed.shape
        wanted = (rows, halves * 2 // BLOCK)
        if halves * 2 % BLOCK or self.scales.shape != wanted:
            raise QuantizationError(
                f"4-bit weights {describe(self.packed)} need a scale for each {BLOCK} values of a "
                f"row, not {describe(self.scales)}."
            )

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return (self.packed.shape[0], self.packed.shape[1] * 2)

    def run(self, numbers: range) -> Mxfp4Bytes:
        # Some of thousands of experts: no tensor of row numbers for each.
        return self.map(lambda part: part[numbers.start : numbers.stop : numbers.step])

    def decode(self, first: int, last: int, out: torch.Tensor) -> None:
        # A byte is looked up as the two values that it holds, in one piece.
        looked_up(_pairs, self.packed[first:last], out.view(torch.int64))
        scales = scale_values(self.scales[first:last])
        out.view(*scales.shape, BLOCK).mul_(scales[..., None])


class Mxfp4(Format):
    """Stacked experts in 4 bits, dequantized at use; each expert is a matrix of its own."""

    name = "MXFP4"
    kinds = ("mxfp4",)
    stores = (Mxfp4Bytes,)
    pieces: ClassVar[Mapping[str, str]] = {
        f".{name}{piece}": f".{name}" for name in ("gate_up_proj", "down_proj") for piece in _PIECES
    }
    foreign: ClassVar[Mapping[str, str]] = {
        "Mxfp4GptOssExperts": "transformers has put the bytes of these experts into the order of "
        "its kernel"
    }
    undeclared: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (piece[1:] for piece in pieces), '{"quant_method": "mxfp4"}'
    )

    def declared(self, fields: Mapping[str, Any]) -> Spec | None:
        if fields.get("quant_method") != "mxfp4":
            return None
        return Spec("mxfp4", modules_in(fields, "modules_to_not_convert"))

    def assemble(self, pieces: Mapping[str, torch.Tensor], spec: Any) -> QuantizedBytes:
        blocks, scales = _blocks_and_scales(pieces)
        experts, rows, groups, halves = blocks.shape
        return Mxfp4Bytes(
            blocks.reshape(experts * rows, groups * halves), scales.reshape(experts * rows, groups)
        )

    def as_parameter(self, matrix: Any, pieces: Mapping[str, torch.Tensor]) -> Any:
        experts, rows = _blocks_and_scales(pieces)[0].shape[:2]
        return matrix.view(experts, rows, -1).transpose(1, 2)

    def sample(self, kind: str, device: torch.device) -> QuantizedBytes:
        packed = torch.arange(64 * 64, device="cpu").remainder(256).to(torch.uint8).view(64, 64)
        scales = torch.arange(120, 124, device="cpu").to(torch.uint8).repeat(64, 1)
        return Mxfp4Bytes(packed.to(device), scales.to(device))


def _blocks_and_scales(pieces: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The two pieces of stacked experts.

    Raises:
        QuantizationError: one is missing or misshapen.
    """
    named = {piece: part for name, part in pieces.items() for piece in _PIECES if piece in name}
    if len(pieces) != len(_PIECES) or len(named) != len(_PIECES):
        raise damaged(
            f"experts in 4 bits are blocks and scales, not {' and '.join(sorted(pieces))}"
        )
    blocks, scales = (named[piece] for piece in _PIECES)
    if (blocks.dtype, scales.dtype) != (torch.uint8, torch.uint8):
        raise QuantizationError(
            f"blocks and scales are uint8, not {describe(blocks)} and {describe(scales)}."
        )
    if blocks.dim() != 4 or blocks.shape[3] * 2 != BLOCK or scales.shape != blocks.shape[:3]:
        raise QuantizationError(
            f"blocks [experts, out, in / {BLOCK}, {BLOCK // 2}] need scales [experts, out, "
            f"in / {BLOCK}], not {describe(blocks)} and {describe(scales)}."
        )
    return blocks, scales
