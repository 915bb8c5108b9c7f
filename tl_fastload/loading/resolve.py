"""What the name of a call means, found once: a processed copy, or a model and its adapters."""

from __future__ import annotations

from dataclasses import replace

from tl_fastload.copies.from_hub import locate_copy
from tl_fastload.copies.read import copy_folder
from tl_fastload.errors import MissingFileError
from tl_fastload.ground.memory_orders import STOCK
from tl_fastload.huggingface.pretrained import locate
from tl_fastload.request.sharing import FULLY
from tl_fastload.roads.road import Request
from tl_fastload.shards.load import agreed
from tl_fastload.shards.ranks import Ranks


def resolved(request: Request) -> Request:
    """The call, checked, with the copy that it means or the place of its model.

    Raises:
        LeanLoadError: arguments that contradict each other or this machine, or something that
            cannot be found.
    """
    request.check()
    if request.options.mesh is not None:
        request = request.changed(device=str(Ranks(request.options.mesh).device))
    if request.options.parallel == FULLY:
        request = request.with_options(layout=STOCK)  # FSDP2 takes row-major parameters alone
    with agreed(request.options):
        return _located(request)


def _located(request: Request) -> Request:
    name = request.arguments["model_name"]
    copy = copy_folder(name, request.keywords)
    if copy is not None:
        return replace(request, copy=copy)
    aliases = request.road.aliases()
    try:
        located = locate(
            name,
            in_memory=request.arguments["hf_model"] is not None,
            adapters=request.options.adapter,
            hub=request.keywords.hub,
            aliases=aliases,
        )
    except MissingFileError:  # a repository without a config.json
        place = locate_copy(name, request.keywords, aliases)
        if place is None:
            raise
        return replace(request, copy=place.folder, copy_at=place)
    return replace(request, located=located)
