"""Parts of a model that run on devices of their own, and have their tensors there while they run.

accelerate's offloading leaves meta tensors behind, so that whatever reads a parameter between two
forward passes (stacked weights, processing, saving) finds no values, and it cannot make quantized
tensors. Here a parameter lies at home, mapped or not, and only a copy of it goes to the device.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn

from tl_fastload.ground.geometry import is_dense, span
from tl_fastload.placement.spread import Spread

# An error in a forward pass (a hook that stops it) must not leave copies in the model; torch
# before 2.1 has no such hooks: they are taken away when the part runs the next time.
_ALWAYS = inspect.signature(nn.Module.register_forward_hook).parameters.keys() & {"always_call"}


def put_to_work(model: nn.Module, spread: Spread | None, wrapped: nn.Module | None = None) -> None:
    """Let each part of a placed model run on its device, wherever its inputs and tensors lie.

    What comes before the first block ends up where that runs, as its outputs are added up between
    the parts; later outputs stay where they are made. A model on one device is left as it is.

    Args:
        model: has the parts under their names.
        spread: where they lie and run.
        wrapped: the model that runs in its place, and calls the parts: what it has beside them
            runs with the first block, and its outputs go to where its inputs came from.
    """
    if spread is None or (not spread.streamed and len(set(spread.runs.values())) == 1):
        return
    queue = _Queue()
    first = spread.begins_on
    meet: torch.device | None = first
    parts = {part: model.get_submodule(part) for part in spread.runs}
    for part, device in spread.runs.items():
        meet = None if "." in part else meet  # a block: no embedding comes after it
        _hook(parts[part], _Runner(device, meet, queue))
    if wrapped is None:
        return
    inside = {id(module) for part in parts.values() for module in part.modules()}
    for module in wrapped.modules():
        has_tensors = any(
            t is not None for t in (*module._parameters.values(), *module._buffers.values())
        )
        if has_tensors and module is not wrapped and id(module) not in inside:
            _hook(module, _Runner(first, None, queue))
    _hook(wrapped, _Whole(first))


def _hook(module: nn.Module, runner: Any) -> None:
    module.register_forward_pre_hook(runner.begin, with_kwargs=True)
    always: Any = dict.fromkeys(_ALWAYS, True)
    module.register_forward_hook(runner.end, **always)


class _Whole:
    """Takes the inputs of a model to a device, and its outputs to where the inputs came from, as
    accelerate does: what is computed of both, such as a loss, finds them together.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._came_from: torch.device | None = None

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        came_from = (value.device for value in given if isinstance(value, torch.Tensor))
        self._came_from = next(came_from, None)
        return _moved(args, self._device), _moved(kwargs, self._device)

    def end(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._came_from is None or output is None:
            return None
        if isinstance(output, tuple) and not hasattr(output, "_fields"):
            return tuple(one_moved(one, self._came_from) for one in output)
        # Attentions and hidden states, in tuples, stay where they were made.
        for name, value in dict(output).items() if isinstance(output, dict) else ():
            output[name] = one_moved(value, self._came_from)
        return one_moved(output, self._came_from)


def one_moved(value: Any, device: torch.device) -> Any:
    """A tensor on a device; anything else, also what has tensors in it, as it is."""
    return value.to(device) if isinstance(value, torch.Tensor) else value


class _Queue:
    """When the parts that were streamed last have been computed: two are on a device at most."""

    def __init__(self) -> None:
        self._ends: list[Any] = []

    def __reduce__(self) -> Any:
        return _Queue, ()  # the events of a device belong to this process

    def copies(self, tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        """Copies on a device; on CUDA they are made while earlier parts still compute."""
        if device.type != "cuda":
            return [tensor.to(device, copy=True) for tensor in tensors]
        while len(self._ends) > 1:
            self._ends.pop(0).synchronize()
        here, side = torch.cuda.current_stream(device), _side_stream(device)
        with torch.cuda.stream(side):
            made = [tensor.to(device, copy=True) for tensor in tensors]
        here.wait_stream(side)
        for tensor in made:
            content = getattr(tensor, "content", None)  # of a quantized one
            for one in [tensor] if content is None else content.tensors().values():
                one.record_stream(here)
        return made

    def end(self, device: torch.device) -> None:
        if device.type == "cuda":
            end = torch.cuda.Event()  # type: ignore[no-untyped-call]
            end.record(torch.cuda.current_stream(device))
            self._ends.append(end)


@cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _Runner:
    """Has a part's tensors and inputs on one device while it runs.

    Args:
        device: where the part runs.
        meet: where its outputs go; None to leave them.
        queue: of all parts of the model.
    """

    def __init__(self, device: torch.device, meet: torch.device | None, queue: _Queue) -> None:
        self._device, self._meet, self._queue = device, meet, queue
        self._at_home: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] = []

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._take_away()
        modules = list(module.modules())
        places = [place for one in modules for place in (one._parameters, one._buffers)]
        found = self._away(places)
        if found:  # attributes, too, which some libraries compute with
            found += self._away([one.__dict__ for one in modules])
        away = {id(tensor): tensor for _, _, tensor in found}
        if away:
            # Gradients flow back through the copies.
            views = {} if torch.is_grad_enabled() else _views(away)
            wholes = [key for key in away if key not in views]
            made = self._queue.copies([away[key] for key in wholes], self._device)
            copies = dict(zip(wholes, made, strict=True))
            for key, whole in views.items():
                copies[key] = _same_view(copies[whole], away[whole], away[key])
            for place, name, tensor in found:
                place[name] = copies[id(tensor)]
                self._at_home.append((place, name, tensor, place[name]))
        return _moved(args, self._device), _moved(kwargs, self._device)

    def end(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._at_home:
            self._take_away()
            self._queue.end(self._device)
        return None if self._meet is None or output is None else _moved(output, self._meet)

    def _take_away(self) -> None:
        while self._at_home:
            place, name, tensor, copy = self._at_home.pop()
            if place.get(name) is copy:
                place[name] = tensor

    def _away(self, places: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], str, Any]]:
        """The tensors in some dictionaries that lie on another device."""
        return [
            (place, name, value)
            for place in places
            for name, value in place.items()
            if isinstance(value, torch.Tensor) and value.device != self._device
        ]


def _views(tensors: dict[int, torch.Tensor]) -> dict[int, int]:
    """Which tensors lie in the memory of another one of them, so that they need no copy."""
    by_memory: dict[int, list[int]] = {}
    for key, tensor in tensors.items():
        if type(tensor) in (torch.Tensor, nn.Parameter):
            by_memory.setdefault(tensor.untyped_storage()._cdata, []).append(key)
    found: dict[int, int] = {}
    for keys in by_memory.values():
        whole = max(keys, key=lambda key: tensors[key].numel())
        first = tensors[whole].storage_offset()
        if len(keys) == 1 or not is_dense(tensors[whole]):
            continue
        for key in keys:
            begin = tensors[key].storage_offset() - first
            end = begin + span(tensors[key])
            if key != whole and begin >= 0 and end <= tensors[whole].numel():
                found[key] = whole
    return found


def _same_view(copy: torch.Tensor, whole: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """Of a copy of a tensor what a view is of the tensor itself."""
    offset = copy.storage_offset() + view.storage_offset() - whole.storage_offset()
    return copy.as_strided(view.shape, view.stride(), offset)


def _moved(value: Any, device: torch.device) -> Any:
    """Whatever a part is given, or gives, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_moved(one, device) for one in value)
    if type(value) is dict:
        return {key: _moved(one, device) for key, one in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # A key-value cache, which the part writes to.
        for field in dataclasses.fields(value):
            found = getattr(value, field.name)
            if isinstance(found, torch.Tensor):
                setattr(value, field.name, found.to(device))
    return value
