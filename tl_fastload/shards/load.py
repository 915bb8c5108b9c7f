"""What a load does when several processes share the model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from tl_fastload.recipes.promise import Promise
from tl_fastload.request.options import Options
from tl_fastload.shards.fill import Sharding
from tl_fastload.shards.fully import shard_fully
from tl_fastload.shards.plan import even_or_long
from tl_fastload.shards.ranks import Ranks


def agreed(options: Options) -> AbstractContextManager[None]:
    """What all processes do or none; nothing more for a load in one."""
    return nullcontext() if options.mesh is None else Ranks(options.mesh).together()


def begin(options: Options, model: nn.Module, recipes: dict[str, Promise]) -> Sharding | None:
    """Decide which parts this process gets, and put stand-ins of them into the model; None for a
    load in one process.

    Args:
        options: of the load.
        model: the new model.
        recipes: parameter or buffer -> recipe; becomes that of this process's part, except where
            one process evaluates it for all (`Sharding.exchange`).
    """
    if options.mesh is None:
        return None
    ranks = Ranks(options.mesh)

    def choose(name: str, shape: torch.Size) -> list[int] | None:
        return even_or_long(shape, ranks.size)

    sharding = Sharding.begin(model, recipes, choose, ranks)
    sharding.cut(recipes)
    return sharding


def finish(sharding: Sharding, model: nn.Module) -> None:
    """Make the parts that were placed one model."""
    shard_fully(sharding, model)
