"""A live model's own values: as promises, safe to write back, and whether they have changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tl_fastload.ground.own_defaults import looking_only
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.quantized.recipes import promise_of_tensor
from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise
from tl_fastload.report.memory import stored_parts


def as_promise(tensor: torch.Tensor, name: str) -> Promise:
    """A promise of a tensor in memory, under the name that messages give it."""
    if isinstance(tensor, QuantizedTensor):
        return promise_of_tensor(tensor, name)
    return Promise.of(MemorySource(tensor, name), tensor.device)


def own_values_apart(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Make a state dict that holds the model's own memory safe to write back into the model.

    A parameter under its own name is recorded in the order of its logical shape, as stock has it:
    sums over our strides would round differently. One under another name is copied, or it would be
    overwritten before it is read.
    """
    if all(isinstance(value, Promise) for value in state_dict.values()):
        return dict(state_dict)
    tensors = _own_tensors(model)
    own = {id(tensor): name for name, tensor in tensors.items()}
    homes = {t.untyped_storage().data_ptr(): t for t in tensors.values() if has_memory(t)}
    values = dict(state_dict)
    for name, value in state_dict.items():
        if isinstance(value, Promise) or not isinstance(value, torch.Tensor):
            continue
        if not has_memory(value) or value.untyped_storage().data_ptr() not in homes:
            continue
        home = homes[value.untyped_storage().data_ptr()]
        in_place = own.get(id(home)) == name and value.data_ptr() == home.data_ptr()
        if not in_place or value.shape != home.shape or value.stride() != home.stride():
            values[name] = value.detach().clone(memory_format=torch.contiguous_format)
        elif value.dim() > 1 and not value.is_contiguous():
            values[name] = as_promise(value, name).contiguous()
    return values


@looking_only
def _own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor has one address: neither a recipe nor quantized bytes."""
    return not isinstance(tensor, (Promise, QuantizedTensor)) and tensor.numel() > 0


def table_problem(
    name: str, shape: torch.Size, dtype: torch.dtype, buffer: torch.Tensor
) -> str | None:
    """Why a table that the model computes (mask, rotary embedding) keeps its own values, or None.

    Args:
        name: of the table.
        shape: of another one.
        dtype: of the other one.
        buffer: the model's own.
    """
    one_number = buffer.dim() == 0 and shape.numel() == 1
    if shape != buffer.shape and not one_number:
        return f"misshapen: {name} is {tuple(shape)}, the model has {tuple(buffer.shape)}"
    if _bits(dtype) < _bits(buffer.dtype):
        return f"{name} is {dtype}, which would round it"
    return None


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits if dtype.is_floating_point else 0


@looking_only
def parameter_versions(model: nn.Module) -> list[tuple[str, int, int]]:
    """Changes whenever a parameter is replaced or written to."""
    return [
        (name, _address(p), p._version)
        for name, p in model.named_parameters()
        if p.numel() and not p.is_inference()
    ]


def _address(parameter: torch.Tensor) -> int:
    return stored_parts(parameter)[0].data_ptr()
