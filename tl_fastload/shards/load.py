"""What a load does when several processes share the model."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import nn

from tl_fastload.errors import NumbersWarning
from tl_fastload.recipes.promise import Promise
from tl_fastload.request.options import Options
from tl_fastload.request.sharing import FULLY
from tl_fastload.roads.known import road_of
from tl_fastload.shards.fill import Sharding
from tl_fastload.shards.fully import shard_fully
from tl_fastload.shards.plan import Choose, even_or_long
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
    ranks, road = Ranks(options.mesh), road_of(model)
    shared = road.shared(model)
    choose: Choose
    if options.parallel == FULLY:
        choose = partial(even_or_long, ranks.size)
    else:
        choose = road.tensor_parallel().dims_to_share(model, ranks.size)
    sharding = Sharding.begin(model, shared, recipes, choose, ranks)
    sharding.cut(recipes)
    return sharding


def finish(sharding: Sharding, options: Options) -> None:
    """Make the parts that were placed one model."""
    shared = sharding.shared
    sharding.places = shared.places
    if options.parallel == FULLY:
        shard_fully(sharding)
        shared.follow()
        return
    tensor_parallel = road_of(shared.model).tensor_parallel
    from tl_fastload.shards.tensor import compute_in_parts, shard_tensors

    layers = tensor_parallel().layers(shared.model, shard_tensors(sharding))
    compute_in_parts(layers, sharding.ranks.mesh)
    shared.follow()
    warnings.warn(
        'parallel="tp" adds up what processes compute, in another order than one process does: '
        "numbers differ by rounding.",
        NumbersWarning,
        stacklevel=2,
    )
