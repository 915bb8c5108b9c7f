"""A matrix of one-byte codes times scales: of the whole matrix, of its rows, or of its blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from tl_fastload.errors import QuantizationError
from tl_fastload.ground.compat import dtypes
from tl_fastload.quantized.formats.base import QuantizedBytes, describe, runs_of, take_rows
from tl_fastload.quantized.views import runs_untraced

_CODES = dtypes({name: name for name in ("float8_e4m3fn", "float8_e5m2")})
FLOAT8 = frozenset(_CODES.values())
"""8-bit floats that are codes of weights; none in torch before 2.1."""
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
_POWERS = frozenset(dtypes({"": "float8_e8m0fnu"}).values())

# Values that are decoded at a time: what is looked up stays in the processor's cache.
_PART_SIZE = 1 << 18


@dataclass(frozen=True, eq=False)
class ScaledBytes(QuantizedBytes):
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
        for name, grid in (("scales", self.scales), ("zero points", self.zero_points)):
            if grid is not None and not self._fits(grid):
                wanted = list(grid_of(self.shape, self.block))
                raise QuantizationError(
                    f"weights {describe(self.codes)} in blocks of {list(self.block)} need {wanted} "
                    f"{name}, not {describe(grid)}."
                )

    def _fits(self, grid: torch.Tensor) -> bool:
        return not self.codes.numel() or grid.shape == grid_of(self.shape, self.block)

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

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        values = _decoded(self.codes, self.code)
        if self.zero_points is not None:
            over_blocks(torch.Tensor.sub_, values, self.zero_points.float(), self.block)
        over_blocks(torch.Tensor.mul_, values, scale_values(self.scales), self.block)
        return values.to(dtype)


def grid_of(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks a matrix has along each side."""
    return (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


@runs_untraced
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


def _decoded(codes: torch.Tensor, code: str) -> torch.Tensor:
    """Codes as float32, a new contiguous tensor."""
    if codes.dtype == torch.uint8 and codes.device.type == "cpu":
        return looked_up(_values_of(code), codes)  # five times as fast as torch's conversion
    values = codes if codes.dtype == torch.int8 else codes.view(_CODES[code])
    return values.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


@functools.cache
def _values_of(code: str) -> Callable[[], torch.Tensor]:
    """Makes the value of each code of an 8-bit float, [256] float32."""

    def make() -> torch.Tensor:
        codes = torch.arange(256, dtype=torch.int32, device="cpu").to(torch.uint8)
        return codes.view(_CODES[code]).to(torch.float32)

    return make


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32; exponents as powers of two."""
    return looked_up(_powers, scales) if scales.dtype == torch.uint8 else scales.to(torch.float32)


def _powers() -> torch.Tensor:
    """2^(s - 127) for each s, [256] float32: torch's exp2 need not be exact."""
    exact = [2.0 ** (s - 127) for s in range(256)]
    return torch.tensor(exact, dtype=torch.float64, device="cpu").to(torch.float32)


def looked_up(make: Callable[[], torch.Tensor], codes: torch.Tensor) -> torch.Tensor:
    """What a table of 256 values has for each code, a new contiguous tensor.

    Args:
        make: makes the table; asked once.
        codes: [rows, columns] uint8.
    """
    if type(codes) is not torch.Tensor:  # traced, and so is the making of the table
        return make().to(codes.device)[codes.to(torch.int32)]
    table = _table(make)
    values = torch.empty(codes.shape, dtype=table.dtype, device=codes.device)
    if codes.is_meta:
        return values
    table = table.to(codes.device)
    on_cpu = codes.device.type == "cpu"
    step = max(1, _PART_SIZE // max(codes.shape[1], 1)) if on_cpu else max(len(codes), 1)
    for first in range(0, len(codes), step):
        part = codes[first : first + step].to(torch.int32).flatten()
        torch.index_select(table, 0, part, out=values[first : first + step].view(-1))
    return values


@functools.cache
@runs_untraced
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
    scales = scales.view(torch.uint8) if scales.dtype in _POWERS else scales
    scales = scales.reshape(grid)
    zero_points = None if zero_points is None else zero_points.reshape(grid)
    if stacked > 1 and out % high:
        # Blocks end with each matrix: take lower ones, which do not reach into the next.
        lower = math.gcd(out, high)
        of_grid = torch.arange(out // lower, device="cpu") * lower // high
        high, of_grid = lower, of_grid.to(scales.device)
        scales = scales[:, of_grid]
        zero_points = None if zero_points is None else zero_points[:, of_grid]
    name = str(codes.dtype).removeprefix("torch.")
    raw = codes if codes.dtype == torch.int8 else codes.view(torch.uint8)
    return ScaledBytes(
        raw.reshape(stacked * out, columns),
        scales.reshape(-1, grid[-1]),
        (high, wide),
        kind,
        name,
        None if zero_points is None else zero_points.reshape(-1, grid[-1]),
    )


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def scaled_sample(dtype: torch.dtype, kind: str, device: torch.device) -> ScaledBytes:
    """A small matrix, [64, 128], whose blocks are codes of one sign."""
    codes = torch.arange(64 * 128, device="cpu").remainder(100).view(64, 128)
    codes = codes.to(torch.int8).to(torch.float32).to(dtype).to(device)
    scales = torch.linspace(-1, 1, 8, device="cpu").view(2, 4).to(device)
    return scaled_bytes(codes, scales, (32, 32), kind)


def stacked_again(matrix: Any, codes: torch.Tensor) -> Any:
    """The matrix of `scaled_bytes` as it is stored: [stacked, out, in] for stacked codes."""
    return matrix.view(codes.shape) if codes.dim() == 3 else matrix
