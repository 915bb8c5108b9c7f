"""A live model's parameters, put into another memory order one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tl_fastload.errors import ArgumentError
from tl_fastload.ground.geometry import copied, same_layout
from tl_fastload.ground.memory_orders import check_layout
from tl_fastload.placement.own_values import parameter_versions
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.report.memory import return_freed_memory
from tl_fastload.roads.known import road_of


@dataclass(frozen=True)
class _Move:
    """One parameter that lies, or whose gradient lies, in another order than is wanted."""

    name: str
    parameter: nn.Parameter
    strides: tuple[int, ...]

    @property
    def is_needed(self) -> bool:
        return any(not self._lies(tensor) for tensor in self._tensors())

    def do(self) -> None:
        """Copy the values and put them under the same Parameter, then those of the gradient."""
        with torch.inference_mode(self.parameter.is_inference()), torch.no_grad():
            for tensor in self._tensors():
                if not self._lies(tensor):
                    tensor.data = copied(tensor.detach(), self.strides, tensor.dtype)

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield self.parameter
        if self.parameter.grad is not None:
            yield self.parameter.grad

    def _lies(self, tensor: torch.Tensor) -> bool:
        return same_layout(tensor.shape, tuple(tensor.stride()), self.strides)


def put_in_layout(model: Any, order: str) -> None:
    """Put every parameter of a model, and its gradient, into a memory order.

    Args:
        model: one that was loaded lean; its Parameter objects stay.
        order: of `ground.memory_orders.LAYOUTS`.

    Raises:
        ArgumentError: `order`, or parameters that cannot be moved; nothing has changed.
    """
    check_layout(order)
    moves = _moves(model, order)
    _check_memory(model, moves)
    done, at_the_time = getattr(model, "_processed", (set(), None))
    is_known = at_the_time is not None and parameter_versions(model) == at_the_time
    try:
        # The largest first: what its copy takes is there again for the others.
        for move in sorted(moves, key=lambda move: -move.parameter.numel()):
            move.do()
    finally:
        if is_known:  # the values are those that were processed, wherever they lie
            model._processed = (done, parameter_versions(model))
        return_freed_memory()
    model._layout = order


def _moves(model: nn.Module, order: str) -> list[_Move]:
    found: dict[int, _Move] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, QuantizedTensor):
            continue
        _check_plain(name, parameter)
        module = model.get_submodule(name.rpartition(".")[0])
        strides = road_of(model).strides_in(order, module, name, parameter.shape)
        move = _Move(name, parameter, strides)
        other = found.setdefault(id(parameter), move)
        if not same_layout(parameter.shape, other.strides, strides):
            raise ArgumentError(
                f"{other.name} and {name} are one parameter, which cannot lie in memory as both "
                f"want it in layout={order!r}. Nothing was changed. Give each a Parameter of its "
                "own first."
            )
    return [move for move in found.values() if move.is_needed]


def _check_plain(name: str, parameter: nn.Parameter) -> None:
    for what, tensor in ((name, parameter), (f"{name}.grad", parameter.grad)):
        if tensor is None:
            continue
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided:
            kind = type(tensor).__name__ if tensor.layout == torch.strided else tensor.layout
            raise ArgumentError(
                f"{what} is a {kind}, whose memory is not ours to order. Nothing was changed. Call "
                "to_layout_ before the model is distributed or its parameters are wrapped, or load "
                "with layout=."
            )
        if tensor.is_meta:
            raise ArgumentError(
                f"{what} has no values here (device meta). Nothing was changed. Call to_layout_ "
                "before the model is offloaded, or load with layout=."
            )


def _check_memory(model: nn.Module, moves: list[_Move]) -> None:
    """Raise ArgumentError if something else would go on with the memory that a parameter leaves."""
    moving = {id(move.parameter) for move in moves}
    spans = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, QuantizedTensor) or tensor.numel() == 0 or tensor.is_meta:
            continue
        is_moving, on_host = id(tensor) in moving, tensor.device.type == "cpu"
        if is_moving and on_host and tensor.is_shared():  # type: ignore[no-untyped-call]
            raise ArgumentError(
                f"{name} lies in memory that processes share (share_memory). Nothing was changed. "
                "Call to_layout_ before the model is shared, or load with layout=."
            )
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        spans.append((str(tensor.device), start, start + storage.nbytes(), name, tensor))
    spans.sort(key=lambda span: span[:3])
    farthest = None  # of those so far, the one that reaches farthest
    for span in spans:
        device, start, stop, name, tensor = span
        if farthest is not None and farthest[0] == device and start < farthest[2]:
            if moving & {id(tensor), id(farthest[4])}:
                raise ArgumentError(
                    f"{farthest[3]} and {name} share memory, which layout= would part. Nothing was "
                    "changed. Give each memory of its own first: parameter.data = "
                    "parameter.data.clone()."
                )
            if stop <= farthest[2]:
                continue
        farthest = span
