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

from tl_fastload.ground.geometry import strides_of_order
from tl_fastload.ground.memory_orders import STOCK
from tl_fastload.hooked.names import role

# What copies a matrix on each call if it does not lie in the order [out, in].
_COPYING = (AbstractAttention, GatedMLP, Unembed)


def strides_in(order: str, module: nn.Module, name: str, shape: torch.Size) -> tuple[int, ...]:
    """Dense strides of a parameter in one of `ground.memory_orders.LAYOUTS`.

    Args:
        order: "forward" as the forward pass multiplies, "stock" row-major.
        module: the component that owns the parameter.
        name: the parameter's name in the model.
        shape: the parameter's logical shape.

    Returns:
        Strides in elements.
    """
    if order == STOCK:
        return strides_of_order(shape, tuple(range(len(shape))))
    return forward_strides(module, name, shape)


def forward_strides(module: nn.Module, name: str, shape: torch.Size) -> tuple[int, ...]:
    """Strides that make a parameter's use in the forward pass free of copies.

    Args:
        module: the component that owns the parameter.
        name: the parameter's name in the model.
        shape: the parameter's logical shape.

    Returns:
        Strides in elements; contiguous ones where the forward pass wants nothing else.
    """
    order = role(name).order
    if not isinstance(module, _COPYING) or len(order) != len(shape):
        order = tuple(range(len(shape)))
    return strides_of_order(shape, order)
