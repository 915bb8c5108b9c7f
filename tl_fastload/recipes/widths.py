"""Which operations give the same bits whatever number of threads they run in.

torch sums each output element in one thread (ATen/native/TensorIteratorReduce.cpp), unless there is
only one element. What the number of threads can change is in which of its vector loops a column is
summed, where threads share columns: their shares begin at multiples of 128 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any

import torch

from tl_fastload.recipes.nodes import aten

_ELEMENTWISE = {
    aten.mul.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.div.Tensor,
    aten.clone.default,
    aten._to_copy.default,
}
_SUMS = {aten.mean.dim, aten.sum.dim_IntList}
_GRAIN_NUMEL = 32768  # at::internal::GRAIN_SIZE: fewer elements are one thread's anyway
_BLOCK_BYTES = 256  # four of the widest vectors, which one vector loop takes at a time


def same_in_any_width(
    func: Any, arguments: list[Any], width: int, kwargs: Mapping[str, Any] = MappingProxyType({})
) -> bool:
    """Whether an operation gives the same bits in one thread as in `width`, on the CPU.

    Args:
        func: the ATen operation.
        arguments: of its call, tensors in place.
        width: threads of the caller.
        kwargs: of its call.
    """
    if width == 1:
        return True
    if func in _ELEMENTWISE:
        # Where a thread's share begins decides which elements a vector loop takes, and only there
        # is a product with another factor added without being rounded.
        return kwargs.get("alpha", 1) in (1, -1)
    if func not in _SUMS or not isinstance(arguments[0], torch.Tensor) or len(arguments) < 2:
        return False
    operand, dims = arguments[0], arguments[1]
    if operand.numel() < _GRAIN_NUMEL:
        return True
    if not dims:
        return False
    summed = {dim % operand.dim() for dim in dims}
    kept = [dim for dim in range(operand.dim()) if dim not in summed]
    sizes = [operand.shape[dim] for dim in kept]
    if prod(sizes) < 2:
        return False
    # Rows, each summed by itself; a dimension of one element has whatever stride.
    if any(operand.stride(dim) == 1 < operand.shape[dim] for dim in summed):
        return True
    if operand.stride(kept[-1]) != 1:
        return False
    # The columns of the last dimension are shared, or those of all together if they lie in one row.
    shared = [prod(sizes)] if prod(sizes[:-1]) >= width else [prod(sizes), sizes[-1]]
    return all(-(-n // width) * operand.element_size() % _BLOCK_BYTES == 0 for n in shared)
