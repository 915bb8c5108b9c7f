"""Tensor parallelism: each process has some of the heads and of the MLPs' columns, as DTensors, and
TransformerLens' own forward pass runs on them.

Outside of attention and MLP layers everything is whole, in every process. A layer's input is taken
as a replica, its output is summed up (as in Megatron-LM, arXiv 1909.08053), and in between
whatever the forward pass makes or holds whole is a replica as well. Hooks see and give whole
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.overrides import TorchFunctionMode
from transformer_lens.hook_points import HookPoint

from tl_fastload.errors import ArgumentError
from tl_fastload.hooked.names import role

_SIDES = {"attention": "head", "MLP": "d_mlp"}


def dims_to_share(model: Any, n_ranks: int) -> Callable[[str, torch.Size], list[int] | None]:
    """Which dimension of a parameter is shared among processes; None for one that all have whole.

    Args:
        model: the model.
        n_ranks: how many processes there are.

    Raises:
        ArgumentError: it has experts, or no heads or columns that divide.
    """
    cfg = model.cfg
    if getattr(cfg, "num_experts", None):
        raise ArgumentError(
            f'parallel="tp" cannot share experts (num_experts={cfg.num_experts}): use '
            'parallel="fsdp".'
        )
    columns = 0 if cfg.attn_only else cfg.d_mlp
    if cfg.n_heads % n_ranks and (columns % n_ranks or not columns):
        raise ArgumentError(
            f'parallel="tp" shares heads and MLP columns among {n_ranks} processes, and neither '
            f'n_heads={cfg.n_heads} nor d_mlp={columns} divides: use parallel="fsdp", or fewer '
            "processes."
        )

    def shared(name: str, shape: torch.Size) -> list[int] | None:
        found = role(name)
        side = _SIDES.get(found.part, "")
        dim = found.dim(side) if found.kind in ("matrix", "bias") else None
        whole = side == "head" and cfg.n_heads % n_ranks
        return None if dim is None or shape[dim] % n_ranks or whole else [dim]

    return shared


def run_in_parallel(model: Any, dims: Mapping[str, int | None], mesh: Any) -> None:
    """Make a model compute with parts of its parameters.

    Args:
        model: its parameters are this process's parts.
        dims: parameter -> the dimension that is shared; None for one that is whole.
        mesh: the processes.
    """
    layers: dict[int, nn.Module] = {}
    for name, dim in dims.items():
        if dim is not None:
            parent, _, leaf = name.rpartition(".")
            module = model.get_submodule(parent)
            own = module._parameters[leaf]
            made = DTensor.from_local(own.detach(), mesh, [Shard(dim)], run_check=False)
            module._parameters[leaf] = nn.Parameter(made, requires_grad=own.requires_grad)
            layers[id(module)] = module
    for layer in layers.values():
        _become(layer, "forward", _shared, mesh)
        for point in layer.modules():
            if isinstance(point, HookPoint):
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
        return out.full_tensor().clone() if isinstance(out, DTensor) else out

    return run


def _with_whole_hooks(call: Callable[..., Any], mesh: Any) -> Callable[..., Any]:
    """Of a HookPoint whose hooks see and give whole tensors."""

    def run(point: Any, x: Any) -> Any:
        if not isinstance(x, DTensor) or not (point._forward_hooks or point._backward_hooks):
            return call(point, x)
        given = call(point, x.full_tensor().clone())  # hooks may write into it
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
