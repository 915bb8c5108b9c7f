"""Tensors in a memory order of their own: strides, and copies that have them."""

from __future__ import annotations

import torch


def strides_of_order(shape: torch.Size, order: tuple[int, ...]) -> tuple[int, ...]:
    """Dense strides, in elements, of a tensor whose dimensions lie in this order, slowest first."""
    strides = [0] * len(shape)
    step = 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def same_layout(shape: torch.Size, one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two strides mean the same memory order; the stride of a dimension of size one means
    nothing.
    """
    return all(n == 1 or a == b for n, a, b in zip(shape, one, other, strict=True))


def copied(tensor: torch.Tensor, strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A copy of a tensor in another memory order.

    Args:
        tensor: the values.
        strides: dense strides of the copy.
        dtype: dtype of the copy.
    """
    copy = torch.empty_strided(tensor.shape, strides, dtype=dtype, device=tensor.device)
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
