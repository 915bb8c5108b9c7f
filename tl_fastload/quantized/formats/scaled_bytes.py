"""A matrix of one-byte codes times scales: of the whole matrix, of its rows, or of its blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tl_fastload.errors import QuantizationError
from tl_fastload.ground.compat import dtypes
from tl_fastload.quantized.formats.base import describe, join_rows, runs_of, take_rows
from tl_fastload.quantized.formats.decoded import DecodedBytes
from tl_fastload.quantized.views import untraced

_CODES = dtypes({name: name for name in ("float8_e4m3fn", "float8_e5m2")})
FLOAT8 = frozenset(_CODES.values())
"""8-bit floats that are codes of weights; none in torch before 2.1."""
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
_POWERS = frozenset(dtypes({"": "float8_e8m0fnu"}).values())


@dataclass(frozen=True, eq=False)
class ScaledBytes(DecodedBytes):
    """The matrix is `(codes - zero points) * scales`, a scale and a zero point for each block; the
    product is one of float32, and rounded to the computing dtype once.

    Attributes:
        codes: [out, in] int8, or uint8 for the bits of 8-bit floats, which torch neither pickles
            nor joins everywhere.
        code: what a code is: "int8", or torch's name of an 8-bit float.
        scales: [ceil(out / rows), ceil(in / columns)] for blocks of rows x columns; floating point,
            or uint8 s for the power 2^(s - 127).
        block: (rows, columns) of a block: those at the ends may be cut short.
        kind: of the checkpoint's spec.
        zero_points: as many as scales, int8; None for zeros.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]
    kind: str
    code: str = "int8"
    zero_points: torch.Tensor | None = None

    tag: ClassVar[str] = "scaled"

    def __post_init__(self) -> None:
        wanted_dtype = torch.int8 if self.code == "int8" else torch.uint8
        if self.codes.dim() != 2 or self.codes.dtype != wanted_dtype:
            raise QuantizationError(
                f"{self.code} codes are a matrix of {wanted_dtype}, not {describe(self.codes)}."
            )
        if self.code not in ("int8", *_CODES):
            raise QuantizationError(
                f"codes are int8 or one of {', '.join(_CODES) or 'none'}, as this torch has them, "
                f"not {self.code}."
            )
        if self.scales.dtype not in _SCALES:
            raise QuantizationError(
                f"scales are floating point or uint8 exponents, not {describe(self.scales)}."
            )
        if self.zero_points is not None and self.zero_points.dtype != torch.int8:
            raise QuantizationError(f"zero points are int8, not {self.zero_points.dtype}.")
        wanted = grid_of(self.shape, self.block) if self.codes.numel() else None
        for name, grid in (("scales", self.scales), ("zero points", self.zero_points)):
            if wanted is not None and grid is not None and grid.shape != wanted:
                raise QuantizationError(
                    f"weights {describe(self.codes)} in blocks of {list(self.block)} need "
                    f"{list(wanted)} {name}, not {describe(grid)}."
                )

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return (self.codes.shape[0], self.codes.shape[1])

    def rows(self, index: torch.Tensor) -> ScaledBytes:
        codes = take_rows(self.codes, index)
        if self.scales.shape[0] == 1:
            return replace(self, codes=codes, block=(max(len(index), self.block[0]), self.block[1]))
        high, of_grid = _rows_of_grid(index, self.block[0], self.shape[0])
        zeros = self.zero_points
        return replace(
            self,
            codes=codes,
            scales=take_rows(self.scales, of_grid),
            zero_points=None if zeros is None else take_rows(zeros, of_grid),
            block=(high, self.block[1]),
        )

    @classmethod
    def joined(cls, parts: Sequence[ScaledBytes]) -> ScaledBytes:
        # One scale of all rows is one of a block.
        high = min(parts[0].block[0], parts[0].shape[0])
        if any(part.shape[0] % high for part in parts[:-1]):
            raise QuantizationError("its blocks go over the edges of the matrices in it")
        blocks = [
            replace(part, block=(min(part.block[0], part.shape[0]), part.block[1]))
            for part in parts
        ]
        return join_rows(blocks, ("codes", "scales", "zero_points"))

    @property
    def row_step(self) -> int:
        return 1 if self.scales.shape[0] == 1 else self.block[0]

    def decode(self, first: int, last: int, out: torch.Tensor) -> None:
        _decode(self.codes[first:last], self.code, out)
        if self.zero_points is not None:
            zeros = self._of_rows(self.zero_points, first, last).float()
            over_blocks(torch.Tensor.sub_, out, zeros, self.block)
        scales = scale_values(self._of_rows(self.scales, first, last))
        over_blocks(torch.Tensor.mul_, out, scales, self.block)

    def _of_rows(self, grid: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """The part of a grid that belongs to some rows."""
        if grid.shape[0] == 1:
            return grid
        return grid[first // self.block[0] : -(-last // self.block[0])]


def grid_of(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks a matrix has along each side."""
    return (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


@untraced()
def _rows_of_grid(index: torch.Tensor, high: int, rows: int) -> tuple[int, torch.Tensor]:
    """Scales for some rows of a matrix with blocks of `high` rows: the height of the blocks that
    these rows make, at most `high`, and for each of them the row of the old grid.
    """
    if high == 1:
        return 1, index
    runs = runs_of(index)
    edges = [edge for run in runs for edge in run]
    if edges[-1] == rows:  # a block that is cut short may stand at the end
        edges.pop()
    height = math.gcd(high, *edges)
    blocks = [torch.arange(a // height, -(-b // height), device="cpu") for a, b in runs]
    return height, torch.cat(blocks) * height // high


def _decode(codes: torch.Tensor, code: str, out: torch.Tensor) -> None:
    """Write what codes are, without their scales, into `out`, float32."""
    if codes.dtype == torch.int8:
        out.copy_(codes)
    elif type(codes) is not torch.Tensor or codes.device.type != "cpu":
        out.copy_(codes.view(_CODES[code]))
    elif code == "float8_e5m2":  # the upper half of a float16
        out.copy_((codes.to(torch.int16) << 8).view(torch.float16))
    elif code == "float8_e4m3fn" and not _has_nan(codes):
        # Sign, exponent and mantissa at their places in a float16, whose exponent counts from 15,
        # not from 7. Far faster on a CPU than torch's conversion.
        bits = (codes.view(torch.int8).to(torch.int16) << 7) & ~(1 << 14)
        out.copy_(bits.view(torch.float16)).mul_(1 << 8)
    else:
        looked_up(_VALUES[code], codes, out)


def _has_nan(codes: torch.Tensor) -> bool:
    """Whether there is a code of e4m3fn that is no number: seven ones, with either sign."""
    return codes.numel() > 0 and (
        int(codes.max()) == 255 or int(codes.view(torch.int8).max()) == 127
    )


def _values_of(code: str) -> torch.Tensor:
    """The value of each code of an 8-bit float, [256] float32."""
    codes = torch.arange(256, dtype=torch.int32, device="cpu").to(torch.uint8)
    return codes.view(_CODES[code]).to(torch.float32)


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32; exponents as powers of two."""
    return looked_up(_powers, scales) if scales.dtype == torch.uint8 else scales.to(torch.float32)


def powers_of_two(offset: int) -> torch.Tensor:
    """2^(s - offset) for each s, [256] float32: torch's exp2 need not be exact."""
    exact = [2.0 ** (s - offset) for s in range(256)]
    return torch.tensor(exact, dtype=torch.float64, device="cpu").to(torch.float32)


# Tables for `looked_up`.
_VALUES = {code: functools.partial(_values_of, code) for code in _CODES}
_powers = functools.partial(powers_of_two, 127)


def looked_up(
    make: Callable[[], torch.Tensor], codes: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """What a table of 256 values has for each code.

    Args:
        make: makes the table; asked once.
        codes: [rows, columns] uint8.
        out: contiguous, where it goes; None for a new tensor.
    """
    if type(codes) is not torch.Tensor:  # traced, and so is the making of the table
        values = make().to(codes.device)[codes.to(torch.int32)]
        return values if out is None else out.copy_(values)
    table = _table(make).to(codes.device)
    if out is None:
        out = torch.empty(codes.shape, dtype=table.dtype, device=codes.device)
    torch.index_select(table, 0, codes.to(torch.int32).flatten(), out=out.view(-1))
    return out


def pairs_of(values: Sequence[float]) -> torch.Tensor:
    """For each byte the values of its low and its high half, two float32 as one int64; [256].

    Args:
        values: of the 16 codes.
    """
    pairs = [(values[byte & 15], values[byte >> 4]) for byte in range(256)]
    return torch.tensor(pairs, dtype=torch.float32, device="cpu").view(torch.int64).flatten()


@functools.cache
@untraced()
def _table(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode(False):
        return make()


def over_blocks(
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    values: torch.Tensor,
    grid: torch.Tensor,
    block: tuple[int, int],
) -> None:
    """Change a matrix in place by one number for each block.

    Args:
        apply: in place, broadcasting its second argument.
        values: [rows, columns], contiguous.
        grid: one number for each block.
        block: (rows, columns) of a block.
    """
    rows, columns = values.shape
    high, wide = block
    if grid.shape[1] > 1 and (grid.shape[0] < rows or columns % wide):
        grid = grid.repeat_interleave(wide, 1)[:, :columns]
    elif grid.shape[1] > 1:  # as many numbers as rows: not written out
        values, grid = values.view(rows, columns // wide, wide), grid[..., None]
    if grid.shape[0] in (1, rows):
        apply(values, grid)
        return
    whole = rows // high
    apply(values[: whole * high].view(whole, high, *values.shape[1:]), grid[:whole, None])
    if rows % high:
        apply(values[whole * high :], grid[whole:])


def scaled_bytes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int] | None,
    kind: str,
    zero_points: torch.Tensor | None = None,
) -> ScaledBytes:
    """The bytes of a matrix as it is stored, or of stacked ones as one matrix.

    Args:
        codes: [out, in], or [stacked, out, in].
        scales: one for each block; without blocks one for each row, or one for a matrix. Dimensions
            of size one may be missing.
        block: (rows, columns) of a block; None without.
        kind: of the spec.
        zero_points: as many as scales; None for zeros.

    Raises:
        QuantizationError: they do not fit each other.
    """
    if codes.dim() not in (2, 3):
        raise QuantizationError(f"quantized weights are matrices, not {describe(codes)}.")
    stacked = codes.shape[0] if codes.dim() == 3 else 1
    out, columns = codes.shape[-2], codes.shape[-1]
    if block is None:
        block = (out if scales.numel() == stacked else 1, columns)
    high, wide = block
    grid = (stacked, *grid_of((out, columns), block))
    for name, part in (("scales", scales), ("zero points", zero_points)):
        if part is not None and _without_ones(part.shape) != _without_ones(grid):
            raise QuantizationError(
                f"weights {describe(codes)} in blocks of {list(block)} need {list(grid[-2:])} "
                f"{name}{f' for each of {stacked}' if stacked > 1 else ''}, not {describe(part)}. "
                "The block size is that of quantization_config in config.json; without one, there "
                "is a scale for each row or one for all."
            )
    # Blocks end with each of stacked matrices: lower ones do not reach into the next.
    lower = math.gcd(out, high) if stacked > 1 else high

    def as_matrix(part: torch.Tensor) -> torch.Tensor:
        part = part.reshape(grid)
        if lower != high:
            of_grid = torch.arange(out // lower, device="cpu") * lower // high
            part = part[:, of_grid.to(part.device)]
        return part.reshape(-1, grid[-1])

    raw = codes if codes.dtype == torch.int8 else codes.view(torch.uint8)
    return ScaledBytes(
        raw.reshape(stacked * out, columns),
        as_matrix(scales.view(torch.uint8) if scales.dtype in _POWERS else scales),
        (lower, wide),
        kind,
        str(codes.dtype).removeprefix("torch."),
        None if zero_points is None else as_matrix(zero_points),
    )


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def scaled_sample(code: str, kind: str, device: torch.device) -> ScaledBytes:
    """A small matrix, [64, 128], whose blocks are codes of one sign.

    Raises:
        QuantizationError: this torch has no such codes.
    """
    dtype = torch.int8 if code == "int8" else _CODES.get(code)
    if dtype is None:
        raise QuantizationError("this torch has no 8-bit floats")
    codes = torch.arange(64 * 128, device="cpu").remainder(100).view(64, 128)
    codes = codes.to(torch.int8).to(torch.float32).to(dtype).to(device)
    scales = torch.linspace(-1, 1, 8, device="cpu").view(2, 4).to(device)
    return scaled_bytes(codes, scales, (32, 32), kind)
