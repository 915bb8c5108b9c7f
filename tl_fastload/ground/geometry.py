"""Where the elements of a strided tensor lie: spans, gaps, overlaps and memory orders.

Strides and lengths are in elements. A geometry is a tensor of which only shape, strides and offset
count; it is mostly on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch


def span(geometry: torch.Tensor) -> int:
    """How many elements lie from the first of a view to its last; none of an empty one."""
    if geometry.numel() == 0:
        return 0
    steps = zip(geometry.shape, geometry.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)


def is_unbroken(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether strides cover one unbroken range, each element once. (The stride of a dimension of
    size one means nothing; a tensor without elements is unbroken.)
    """
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected and 0 not in shape:
            return False
        expected *= size
    return True


def is_dense(geometry: torch.Tensor) -> bool:
    """Whether a view covers one unbroken range of its source, each element once."""
    return is_unbroken(geometry.shape, geometry.stride())


def has_overlap(geometry: torch.Tensor) -> bool:
    """Whether a view shows some element twice (an expanded dimension)."""
    return any(s == 0 and n > 1 for s, n in zip(geometry.stride(), geometry.shape, strict=True))


def dense_strides(geometry: torch.Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor that keeps the memory order of a view."""
    row_major = strides_of_order(geometry.shape, range(geometry.dim()))
    if geometry.stride() == row_major:
        return row_major  # as below, where torch takes a while on the meta device
    return tuple(torch.empty_like(geometry, memory_format=torch.preserve_format).stride())


@lru_cache(maxsize=1 << 10)  # layers are much alike
def strides_of_order(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Dense strides of a tensor whose dimensions lie in this order, slowest first."""
    strides = [0] * len(shape)
    step = 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def same_layout(shape: Sequence[int], one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two strides mean the same memory order; the stride of a dimension of size one means
    nothing.
    """
    return all(n == 1 or a == b for n, a, b in zip(shape, one, other, strict=True))


def copied(
    tensor: torch.Tensor,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    empty: Callable[..., torch.Tensor] = torch.empty_strided,
) -> torch.Tensor:
    """A copy of a tensor in another memory order.

    Args:
        tensor: the values.
        strides: dense strides of the copy.
        dtype: dtype of the copy.
        empty: makes the tensor to copy into.
    """
    copy = empty(tensor.shape, strides, dtype=dtype, device=tensor.device)
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    source, target = tensor.permute(order), copy.permute(order)
    for split in range(1, tensor.dim()):
        # torch transposes matrices in blocks, and walks other shapes element by element.
        rows = source.shape[:split].numel()
        try:
            target.view(rows, -1).copy_(source.view(rows, -1))
        except RuntimeError:  # these dimensions do not merge
            continue
        return copy
    return copy.copy_(tensor)
