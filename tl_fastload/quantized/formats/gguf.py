"""GGUF's blocks: codes of 2 to 8 bits with scales beside them, as llama.cpp quantizes.

Each block is decoded by the steps, in float32, of gguf-py's `dequantize` (`gguf/quants.py`), so
that values are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from tl_fastload.errors import QuantizationError
from tl_fastload.quantized.formats.base import Format, QuantizedBytes, damaged, describe
from tl_fastload.quantized.formats.decoded import DecodedBytes
from tl_fastload.quantized.formats.scaled_bytes import looked_up, powers_of_two
from tl_fastload.quantized.spec import Spec
from tl_fastload.source.ggml_types import BLOCK_TYPES


@dataclass(frozen=True, eq=False)
class GgufBytes(DecodedBytes):
    """Rows of blocks of one type.

    Attributes:
        packed: [out, bytes of a row] uint8.
        ggml_type: the type's name, such as "Q4_K".
    """

    packed: torch.Tensor
    ggml_type: str

    tag = kind = "gguf"

    def __post_init__(self) -> None:
        if self.ggml_type not in BLOCK_TYPES:
            raise QuantizationError(
                f"blocks are of one of the types {', '.join(BLOCK_TYPES)}, not {self.ggml_type}."
            )
        whole = self.packed.dim() == 2 and self.packed.dtype == torch.uint8
        if not whole or self.packed.shape[1] % BLOCK_TYPES[self.ggml_type].nbytes:
            raise QuantizationError(
                f"rows of {self.ggml_type} are blocks of {BLOCK_TYPES[self.ggml_type].nbytes} "
                f"bytes, not {describe(self.packed)}."
            )

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        block = BLOCK_TYPES[self.ggml_type]
        return (self.packed.shape[0], self.packed.shape[1] // block.nbytes * block.size)

    def decode(self, first: int, last: int, out: torch.Tensor) -> None:
        blocks = self.packed[first:last].reshape(-1, BLOCK_TYPES[self.ggml_type].nbytes)
        out.copy_(_DECODERS[self.ggml_type](blocks).view(out.shape))


def _fields(codes: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Numbers of some bits out of bytes: of each `width` successive bytes first the lowest bits,
    then the next higher ones, and so on.

    Args:
        codes: [n, bytes] uint8.
        bits: of a number.
        width: bytes whose equal bits lie side by side; a multiple of 4.

    Returns:
        [n, 8 bytes / bits] uint8.
    """
    # Four or eight bytes at a time: what comes in from the next byte is masked out.
    lane, dtype = (8, torch.int64) if width % 8 == 0 else (4, torch.int32)
    groups = _dense(codes).view(dtype).view(len(codes), -1, width // lane)
    shape = (len(codes), groups.shape[1], 8 // bits, width // lane)
    parts = torch.empty(shape, dtype=dtype, device=codes.device)
    for place in range(8 // bits):
        torch.bitwise_right_shift(groups, place * bits, out=parts[:, :, place])
    mask = int.from_bytes(bytes([(1 << bits) - 1]) * lane, "little")
    return parts.bitwise_and_(mask).view(torch.uint8).flatten(1)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at a byte of each block, [n, 1] float32."""
    return _dense(blocks[:, at : at + 2]).view(torch.float16).float()


def _dense(codes: torch.Tensor) -> torch.Tensor:
    """A copy, which begins where wider numbers may: what is contiguous already need not."""
    return codes.clone(memory_format=torch.contiguous_format)


def _scaled(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes [n, values], a scale for each of equally many of them: [n, groups, values of a group]
    float32.
    """
    values = codes.float().view(len(codes), scales.shape[1], -1)
    return values.mul_(scales[..., None])


def _q5_codes(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    fifth = looked_up(_fifth_bits, high).view(torch.uint8)
    return _fields(low, 4, 16).bitwise_or_(fifth).float()


def _fifth_bits() -> torch.Tensor:
    """For each byte its bits, lowest first, 16 or 0 in a byte each: eight bytes as one int64."""
    bits = [[16 * (byte >> place & 1) for place in range(8)] for byte in range(256)]
    return torch.tensor(bits, dtype=torch.uint8, device="cpu").view(torch.int64).flatten()


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, codes = blocks[:, :16], _fields(blocks[:, 16:80], 2, 32)
    values = _scaled(codes, (scales & 15).float().mul_(_half(blocks, 80)))
    return values.sub_((scales >> 4).float().mul_(_half(blocks, 82))[..., None])


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    low, high = _fields(blocks[:, 96:104], 4, 8), _fields(blocks[:, 104:108], 2, 4)
    scales = low.bitwise_or_(high << 4).float().sub_(32).mul_(_half(blocks, 108))
    # Codes without the highest bit are those below zero.
    codes = _fields(blocks[:, 32:96], 2, 32).bitwise_or_(_fields(blocks[:, :32], 1, 32) << 2)
    return _scaled(codes.float().sub_(4), scales)


def _with_minima(blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    # Scales and minima of 6 bits, [n, 8] each.
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([low & 63, (high & 15) | (low >> 2 & 48)], 1).float()
    minima = torch.cat([middle & 63, (high >> 4) | (middle >> 2 & 48)], 1).float()
    values = _scaled(codes, scales.mul_(_half(blocks, 0)))
    return values.sub_(minima.mul_(_half(blocks, 2))[..., None])


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    codes = _fields(blocks[:, 48:], 4, 32).bitwise_or_(_fields(blocks[:, 16:48], 1, 32) << 4)
    return _with_minima(blocks, codes)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    codes = _fields(blocks[:, :128], 4, 64).bitwise_or_(_fields(blocks[:, 128:192], 2, 32) << 4)
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208))
    return _scaled(codes.float().sub_(32), scales)


def _doubled_floats() -> torch.Tensor:
    """By code of 4 bits, twice the float that it is; [256] float32, beyond 16 unused."""
    values = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
    return torch.tensor(values + [0] * 240, dtype=torch.float32, device="cpu")


_half_powers = partial(powers_of_two, 128)
_DECODERS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": lambda b: _fields(b[:, 2:], 4, 16).float().sub_(8).mul_(_half(b, 0)),
    "Q4_1": lambda b: _fields(b[:, 4:], 4, 16).float().mul_(_half(b, 0)).add_(_half(b, 2)),
    "Q5_0": lambda b: _q5_codes(b[:, 6:], b[:, 2:6]).sub_(16).mul_(_half(b, 0)),
    "Q5_1": lambda b: _q5_codes(b[:, 8:], b[:, 4:8]).mul_(_half(b, 0)).add_(_half(b, 2)),
    "Q8_0": lambda b: b[:, 2:].view(torch.int8).float().mul_(_half(b, 0)),
    **{"Q2_K": _q2_k, "Q3_K": _q3_k, "Q5_K": _q5_k, "Q6_K": _q6_k},
    "Q4_K": lambda b: _with_minima(b, _fields(b[:, 16:], 4, 32)),
    "MXFP4": lambda b: looked_up(_doubled_floats, _fields(b[:, 1:], 4, 16)).mul_(
        looked_up(_half_powers, b[:, :1])
    ),
}
"""Blocks [n, bytes] uint8 -> their values in float32, n times the block's size of them."""


class Gguf(Format):
    """Matrices of a GGUF file, each of a type of its own, dequantized at use."""

    name = "GGUF"
    kinds = ("gguf",)
    stores = (GgufBytes,)
    # Files do not name pieces: their reader puts the type behind the tensor's name.
    pieces: ClassVar[Mapping[str, str]] = {f".{name}": "" for name in BLOCK_TYPES}
    foreign: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("GgufLinear", "GgufExperts", "GgufEmbedding"),
        "transformers' layers of GGUF blocks are not read",
    )

    def declared(self, fields: Mapping[str, Any]) -> Spec | None:
        return Spec("gguf") if fields.get("quant_method") == "gguf" else None

    def assemble(self, pieces: Mapping[str, torch.Tensor], spec: Spec) -> QuantizedBytes:
        if len(pieces) != 1:
            raise damaged(f"stored {' and as '.join(sorted(pieces))}: one of them is left over")
        ((ggml_type, blocks),) = pieces.items()
        if blocks.dim() not in (2, 3):
            raise QuantizationError(f"quantized weights are matrices, not {describe(blocks)}.")
        return GgufBytes(blocks.reshape(-1, blocks.shape[-1]), ggml_type)

    def sample(self, kind: str, device: torch.device) -> QuantizedBytes:
        codes = torch.arange(64 * 4 * 32, device="cpu").remainder(100).to(torch.int8)
        scales = torch.linspace(-1, 1, 64 * 4, dtype=torch.float16, device="cpu")
        parts = [scales.view(-1, 1).view(torch.uint8), codes.view(-1, 32).view(torch.uint8)]
        return GgufBytes(torch.cat(parts, 1).view(64, 4 * 34).to(device), "Q8_0")
