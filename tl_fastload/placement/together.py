"""What a library computes of the weights, or of the activations, of several parts of a model, where
these lie on several devices: a tensor comes to the device of the one that it meets first.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from tl_fastload.placement.streaming import one_moved

# These take what lies elsewhere, and `to` is asked where that is.
_MOVING = (torch.Tensor.to, torch.Tensor.copy_, torch.Tensor.type_as)


class Together(TorchFunctionMode):
    """Brings the tensors of each operation to one device: that of the first of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        devices = {tensor.device for tensor in found}
        if len(devices) > 1 and func not in _MOVING and not any(x.is_meta for x in found):
            device = found[0].device
            args, kwargs = tree_map(lambda x: one_moved(x, device), (args, kwargs))
        return func(*args, **kwargs)


def is_apart(model: nn.Module) -> bool:
    """Whether a model's parameters lie on several devices."""
    return len({parameter.device for parameter in model.parameters()}) > 1


def over_devices(cls: type, names: re.Pattern[str], caching: str) -> None:
    """Let what a class inherits serve models on several devices, too.

    Args:
        cls: the class; what it defines itself is left alone.
        names: of properties and methods that read the weights of several parts.
        caching: the name of a method that returns an output and a cache of activations.
    """
    for name in dir(cls):
        kind = _CachingOverDevices if name == caching else _OverDevices
        if name in cls.__dict__ or not (name == caching or names.fullmatch(name)):
            continue
        if isinstance(inspect.getattr_static(cls, name), (property, FunctionType)):
            setattr(cls, name, kind(cls, name))


class _OverDevices:
    """In a class, the property or the method that its bases have under some name."""

    def __init__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    def __get__(self, model: Any, cls: Any = None) -> Any:
        if model is None:
            return getattr(super(self._owner, cls), self._name)
        stock = super(self._owner, model)
        if not is_apart(model):
            return getattr(stock, self._name)
        with Together():
            found = getattr(stock, self._name)
        return _together(found) if inspect.ismethod(found) else found


class _CachingOverDevices(_OverDevices):
    """The same for a method that returns a cache: what that computes comes together."""

    def __get__(self, model: Any, cls: Any = None) -> Any:
        if model is None:
            return super().__get__(model, cls)
        run = getattr(super(self._owner, model), self._name)

        @functools.wraps(run)
        def run_with_cache(*args: Any, **kwargs: Any) -> Any:
            out, cache = run(*args, **kwargs)
            return out, _gathering(cache) if is_apart(model) else cache

        return run_with_cache


def _together(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with Together():
            return function(*args, **kwargs)

    return run


def _gathering(cache: Any) -> Any:
    """A cache whose methods bring activations together; a plain dictionary has none."""
    if not isinstance(cache, dict):
        kind: Any = type(cache)
        cache.__class__ = _gathering_class(kind)
    return cache


@functools.cache
def _gathering_class(kind: Any) -> type:
    """A class of caches, with its methods as above. (Pickled, one is the library's own again.)"""
    methods = {
        name: _together(function)
        for name, function in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_")
    }
    slices: Any = methods.get("apply_slice_to_batch_dim")
    if slices is not None:  # makes another cache
        methods["apply_slice_to_batch_dim"] = lambda *a, **kw: _gathering(slices(*a, **kw))
    methods["__reduce__"] = lambda cache: (_remade, (kind, cache.__dict__))
    return type(kind.__name__, (kind,), methods)


def _remade(kind: Any, state: dict[str, Any]) -> Any:
    made = kind.__new__(kind)
    made.__dict__.update(state)
    return made
