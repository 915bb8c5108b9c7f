"""The memory orders that parameters can have: the forward pass's, and stock's.

TransformerLens' components turn `W_Q`, `W_in` ... into the `[out, in]` matrix of a linear map on
every call (`W_in.T.contiguous()`, `einops.rearrange(...).contiguous()`). That copies the whole
model per token when the parameter is stored as its logical shape says, and nothing when it is
stored as that matrix and only viewed in the logical shape. TransformerLens' own loader leaves
parameters row-major throughout, which some code takes for granted.
"""

from __future__ import annotations

import torch
from torch import nn
from transformer_lens.components.abstract_attention import AbstractAttention
from transformer_lens.components.mlps.gated_mlp import GatedMLP
from transformer_lens.components.unembed import Unembed

from tl_fastload.errors import ArgumentError

FORWARD, STOCK = "forward", "stock"
LAYOUTS = (FORWARD, STOCK)

_HEADS_IN = ("W_Q", "W_K", "W_V", "_W_K", "_W_V")

# Memory order of the dimensions, slowest first, of the matrix that the forward pass multiplies by.
_HEADS_IN_ORDER = (0, 2, 1)  # [head, d_model, d_head] stored as [(head d_head), d_model]
_HEADS_OUT_ORDER = (2, 0, 1)  # [head, d_head, d_model] stored as [d_model, (head d_head)]
_TRANSPOSED_ORDER = (1, 0)  # [in, out] stored as [out, in]


def check_layout(value: object) -> None:
    """Raise ArgumentError for what is no memory order."""
    if not isinstance(value, str) or value not in LAYOUTS:
        raise ArgumentError(f"layout={value!r} is none of {', '.join(LAYOUTS)}.")


def strides_in(order: str, module: nn.Module, name: str, shape: torch.Size) -> tuple[int, ...]:
    """Dense strides of a parameter in one of `LAYOUTS`.

    Args:
        order: "forward" as the forward pass multiplies, "stock" row-major.
        module: the component that owns the parameter.
        name: the parameter's name in it, such as "W_Q".
        shape: the parameter's logical shape.

    Returns:
        Strides in elements.
    """
    if order == STOCK:
        return _strides_of_order(shape, tuple(range(len(shape))))
    return forward_strides(module, name, shape)


def forward_strides(module: nn.Module, name: str, shape: torch.Size) -> tuple[int, ...]:
    """Strides that make a parameter's use in the forward pass free of copies.

    Args:
        module: the component that owns the parameter.
        name: the parameter's name in it, such as "W_Q".
        shape: the parameter's logical shape.

    Returns:
        Strides in elements; contiguous ones where the forward pass wants nothing else.
    """
    order: tuple[int, ...] = tuple(range(len(shape)))
    if isinstance(module, AbstractAttention) and len(shape) == 3:
        if name in _HEADS_IN:
            order = _HEADS_IN_ORDER
        elif name == "W_O":
            order = _HEADS_OUT_ORDER
    elif isinstance(module, (GatedMLP, Unembed)) and len(shape) == 2:
        order = _TRANSPOSED_ORDER
    return _strides_of_order(shape, order)


def _strides_of_order(shape: torch.Size, order: tuple[int, ...]) -> tuple[int, ...]:
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
