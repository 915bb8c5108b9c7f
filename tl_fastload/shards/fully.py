"""FSDP2: the parameters of each block lie in parts in the processes, and come together while it
runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tl_fastload.roads.road import Shared
from tl_fastload.shards.fill import Sharding


def units(shared: Shared) -> list[nn.Module]:
    """What comes together at a time, inner ones first: each block, and what stands beside them; and
    around them, as long as the model runs, what is in none of these or in several (tied weights).
    Not the model otherwise: its `forward` may be called directly, past the hooks of a unit.
    """
    own = {id(module) for homes in shared.places.values() for module, _ in homes}
    found = [{id(m): unit for m in unit.modules() if id(m) in own} for unit in _apart(shared)]
    found.sort(key=len, reverse=True)
    unit_of: dict[int, nn.Module] = {}
    for inner in found:
        if not inner.keys() <= unit_of.keys():  # or it is a part of another one
            unit_of.update(inner)
    shared_ones: set[nn.Module | None] = set()
    for homes in shared.places.values():
        among = {unit_of.get(id(module)) for module, _ in homes}
        shared_ones |= among if len(among) > 1 or None in among else set()
    around = [shared.root] if shared_ones else []
    return [unit for unit in dict.fromkeys(unit_of.values()) if unit not in shared_ones] + around


def _apart(shared: Shared) -> Iterator[nn.Module]:
    for child in shared.model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif not shared.has_only_blocks:
            yield child


def _part_again(unit: Any, args: Any, output: Any) -> None:
    """What stops in the middle of a unit, as `stop_at_layer` of a bridge does, leaves it whole."""
    if output is None:
        unit.reshard()


def shard_fully(sharding: Sharding) -> None:
    """Make FSDP2 units of a model whose parameters are this process's parts."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    mesh, plan = sharding.ranks.mesh, sharding.plan
    cut = {name: part.dim for name, part in plan.parts.items() if part.dim is not None}
    parts = {name: sharding.parameter(name).detach() for name in cut}
    for name, part in parts.items():
        whole = torch.empty(sharding.shapes[name], dtype=part.dtype, device="meta")
        sharding.put(name, whole)
    placements = {sharding.parameter(name): Shard(dim) for name, dim in cut.items()}
    numbers = {sharding.parameter(name) for name in sharding.places if name not in cut}
    for unit in units(sharding.shared):
        fully_shard(
            unit,
            mesh=mesh,
            # Each unit is the root of its own, and roots stay whole unless they are told.
            reshard_after_forward=True,
            ignored_params=numbers,
            shard_placement_fn=placements.__getitem__,
        )
        unit.register_forward_hook(_part_again, always_call=True)
    for name in cut:
        empty = sharding.parameter(name)
        made = DTensor.from_local(
            parts.pop(name),
            mesh,
            empty.placements,  # type: ignore[attr-defined]
            run_check=False,
            shape=empty.shape,
            stride=empty.stride(),
        )
        sharding.put(name, made)
