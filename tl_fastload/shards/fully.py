"""FSDP2: the parameters of each block lie in parts in the processes, and come together while it
runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from tl_fastload.shards.fill import Sharding


def units(model: nn.Module) -> Iterator[nn.Module]:
    """What comes together at a time: each block, and what stands beside them. Not the model: its
    `forward` is called directly, past the hooks of a unit (`generate`).
    """
    for child in model.children():
        for unit in child if isinstance(child, nn.ModuleList) else (child,):
            if next(unit.parameters(), None) is not None:
                yield unit


def shard_fully(sharding: Sharding, model: nn.Module) -> None:
    """Make FSDP2 units of a model whose parameters are this process's parts."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    mesh = sharding.ranks.mesh
    parts = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if sharding.plan.parts[name].dim is not None
    }
    for name, part in parts.items():
        whole = torch.empty(sharding.shapes[name], dtype=part.dtype, device="meta")
        sharding.put(name, whole)
    placements = {
        id(parameter): Shard(sharding.plan.parts[name].dim or 0)
        for name, parameter in model.named_parameters()
        if name in parts
    }
    numbers = {parameter for parameter in model.parameters() if id(parameter) not in placements}
    for unit in list(units(model)):
        fully_shard(
            unit,
            mesh=mesh,
            # Each unit is the root of its own, and roots stay whole unless they are told.
            reshard_after_forward=True,
            ignored_params=numbers,
            shard_placement_fn=lambda parameter: placements[id(parameter)],
        )
    for name in list(parts):
        empty = model.get_parameter(name)
        made = DTensor.from_local(
            parts.pop(name),
            mesh,
            empty.placements,  # type: ignore[attr-defined]
            run_check=False,
            shape=empty.shape,
            stride=empty.stride(),
        )
        sharding.put(name, made)
