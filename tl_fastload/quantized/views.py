"""Geometry of a view of an `[out, in]` matrix: whether it shows whole rows, and which; and sums on
geometries while somebody traces: torch.compile, fake tensors, torch.func.

A geometry is a meta tensor whose shape, strides and offset select elements of the matrix, rows one
after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from tl_fastload.ground.geometry import is_unbroken, same_layout


@contextmanager
def untraced() -> Iterator[None]:
    """Operations in this context, or in a function that it decorates, are run at once, and no
    tracer sees them.

    The geometry of a view is kept as a meta tensor. It is bookkeeping, not part of the program that
    is traced, and tracers refuse tensors that are not their own.
    """
    is_traced = torch._C._len_torch_dispatch_stack() > 0
    with _python_dispatch._disable_current_modes() if is_traced else nullcontext():
        yield


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jacrev ...) or forward-mode differentiation is at work."""
    functions: Any = torch._C._functorch
    return functions.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


@untraced()
def whole(shape: tuple[int, int]) -> torch.Tensor:
    """The geometry that shows the matrix itself."""
    # Without a storage, so that nobody who counts memory takes it for a matrix.
    return torch.empty(0, dtype=torch.float32, device="meta").as_strided(shape, (shape[1], 1))


@untraced()
def part(
    matrix: tuple[int, int], shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> torch.Tensor:
    """The geometry with this shape, these strides and this offset in a matrix."""
    return whole(matrix).as_strided(shape, stride, offset)


@untraced()
def transposed(geometry: torch.Tensor) -> torch.Tensor:
    """A matrix's geometry with its two dimensions exchanged."""
    return geometry.t()


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two geometries show the same elements in the same order; the stride of a dimension of
    size one means nothing.
    """
    if one.shape != other.shape or one.storage_offset() != other.storage_offset():
        return False
    return same_layout(one.shape, one.stride(), other.stride())


@dataclass(frozen=True)
class RowView:
    """A view that shows whole rows, perhaps with its dimensions in another order.

    Attributes:
        row_dims: dimensions that run over rows, the one with the largest stride first, if in no
            other order.
        input_dims: dimensions that run over the inputs, the one with the largest stride first.
        columns: length of a row.
        geometry: the view.
    """

    row_dims: tuple[int, ...]
    input_dims: tuple[int, ...]
    columns: int
    geometry: torch.Tensor

    @property
    def run(self) -> range | None:
        """The numbers of `index`, where they are equally far apart."""
        first = self.geometry.storage_offset() // self.columns
        if not self.row_dims:
            return range(first, first + 1)
        dim, *others = self.row_dims
        step = self.geometry.stride(dim) // self.columns
        return None if others else range(first, first + self.geometry.shape[dim] * step, step)

    @untraced()
    def index(self) -> torch.Tensor:
        """The number of each row that the view shows, [n] int64, the last of `row_dims` fastest."""
        index = torch.tensor([self.geometry.storage_offset() // self.columns], device="cpu")
        for dim in self.row_dims:
            step = self.geometry.stride(dim) // self.columns
            steps = torch.arange(self.geometry.shape[dim], device="cpu") * step
            index = (index[:, None] + steps).flatten()
        return index

    @untraced()
    def packed(self) -> torch.Tensor:
        """The geometry of the same view once only its rows are kept, in the order of `index`."""
        shape = self.geometry.shape
        strides = [1] * len(shape)
        step = 1
        for dim in reversed((*self.row_dims, *self.input_dims)):
            strides[dim] = step
            step *= shape[dim]
        return torch.empty(0, dtype=torch.float32, device="meta").as_strided(shape, strides)


def row_view(geometry: torch.Tensor, columns: int) -> RowView | None:
    """How a geometry shows whole rows; None if it shows parts of rows, or repeats or mixes them."""
    if geometry.numel() == 0 or geometry.storage_offset() % columns:
        return None
    strides = geometry.stride()
    # The stride of a dimension of size one means nothing.
    dims = [dim for dim, size in enumerate(geometry.shape) if size > 1]
    if any(strides[dim] == 0 for dim in dims):
        return None
    dims.sort(key=lambda dim: -strides[dim])
    row_dims = tuple(dim for dim in dims if strides[dim] % columns == 0)
    input_dims = tuple(dim for dim in dims if strides[dim] % columns)
    row = [geometry.shape[dim] for dim in input_dims]
    is_whole = math.prod(row) == columns and is_unbroken(row, [strides[dim] for dim in input_dims])
    return RowView(row_dims, input_dims, columns, geometry) if is_whole else None


def linear_rows(geometry: torch.Tensor, columns: int) -> RowView | None:
    """`row_view` of a matrix [rows, inputs], as a linear map wants it; None if it is none."""
    if geometry.dim() != 2 or geometry.shape[1] != columns:
        return None
    view = row_view(geometry, columns)
    if view is None or 1 in view.row_dims:
        return None
    return view
