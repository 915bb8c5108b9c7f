"""Tensor parallelism: each process has some of the heads and of the MLPs' columns, as DTensors, and
the model's own forward pass runs on them.

Outside of attention and MLP layers everything is whole, in every process. A layer's input is taken
as a replica, its output is summed up (as in Megatron-LM, arXiv 1909.08053), and in between
whatever the forward pass makes or holds whole is a replica as well. Hooks see and give whole
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.overrides import TorchFunctionMode

from tl_fastload.shards.fill import Sharding


def shard_tensors(sharding: Sharding) -> list[str]:
    """Make DTensors of this process's parts; returns the names of those."""
    names = [name for name, part in sharding.plan.parts.items() if part.dim is not None]
    for name in names:
        placements = [Shard(sharding.plan.parts[name].dim or 0)]
        part = sharding.parameter(name).detach()
        made = DTensor.from_local(part, sharding.ranks.mesh, placements, run_check=False)
        sharding.put(name, made)
    return names


def compute_in_parts(layers: Iterable[nn.Module], mesh: Any) -> None:
    """Make layers compute with parts of their parameters, and their hooks see whole tensors.

    Args:
        layers: attention and MLP layers.
        mesh: the processes.
    """
    for layer in layers:
        _become(layer, "forward", _shared, mesh)
        for point in layer.modules():
            if any(kind.__name__ == "HookPoint" for kind in type(point).__mro__):
                _become(point, "__call__", _with_whole_hooks, mesh)


def _become(module: nn.Module, method: str, make: Callable[..., Any], mesh: Any) -> None:
    """Give a module a class of its own, as FSDP2 does, in which one method is another."""
    own = type(module)
    module.__class__ = type(own.__name__, (own,), {method: make(getattr(own, method), mesh)})


def _shared(forward: Callable[..., Any], mesh: Any) -> Callable[..., Any]:
    """Of an attention or MLP layer of which this process has a part."""

    def run(layer: Any, *args: Any, **kwargs: Any) -> Any:
        # DTensors have no views in inference mode (`generate`).
        infers = torch.is_inference_mode_enabled()
        trains = torch.is_grad_enabled() and not infers
        with torch.inference_mode(False), torch.set_grad_enabled(trains), _Replicas(mesh):
            out = forward(layer, *args, **kwargs)
        return type(out)(map(_whole, out)) if type(out) in (tuple, list) else _whole(out)

    return run


def _whole(x: Any) -> Any:
    return x.full_tensor().clone() if isinstance(x, DTensor) else x


def _with_whole_hooks(call: Callable[..., Any], mesh: Any) -> Callable[..., Any]:
    """Of a HookPoint whose hooks see and give whole tensors."""

    def run(point: Any, x: Any) -> Any:
        if not isinstance(x, DTensor) or not (point._forward_hooks or point._backward_hooks):
            return call(point, x)
        whole = x.full_tensor().clone()  # hooks may write into it
        before = whole._version
        given = call(point, whole)
        if given is whole and whole._version == before:
            return x  # by which TransformerLens knows that no hook has changed it
        placements = [Replicate() if p.is_partial() else p for p in x.placements]
        return _replica(given, mesh).redistribute(placements=placements)

    return run


class _Replicas(TorchFunctionMode):
    """While it is on, in this thread, what meets a DTensor becomes a replica: each process has the
    same values.
    """

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        self._mesh = mesh

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.cat:  # an empty cache of keys, of one dimension, which DTensor cannot join
            args = ([x for x in args[0] if x.dim() > 1 or x.numel()] or args[0], *args[1:])
        if _any_shared((args, kwargs)) and not _writes_into_whole(func, args):
            args, kwargs = self._replicated(args), self._replicated(kwargs)
        return func(*args, **kwargs)

    def _replicated(self, x: Any) -> Any:
        if isinstance(x, dict):
            return {key: self._replicated(value) for key, value in x.items()}
        if type(x) in (tuple, list):
            return type(x)(self._replicated(value) for value in x)
        is_whole = isinstance(x, torch.Tensor) and not isinstance(x, DTensor)
        return _replica(x, self._mesh) if is_whole else x


def _replica(x: torch.Tensor, mesh: Any) -> DTensor:
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False)


def _any_shared(x: Any) -> bool:
    if isinstance(x, dict):
        x = tuple(x.values())
    if type(x) in (tuple, list):
        return any(map(_any_shared, x))
    return isinstance(x, DTensor)


def _writes_into_whole(func: Any, args: Any) -> bool:
    """Whether an operation would write into a replica that nobody sees: torch then refuses it."""
    name = getattr(func, "__name__", "")
    writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return writes and bool(args) and not isinstance(args[0], DTensor)
