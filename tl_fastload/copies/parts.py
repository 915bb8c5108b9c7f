"""This process's parts of a processed copy, where several share the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tl_fastload.copies.contents import Contents, layout_of
from tl_fastload.copies.manifest import checked_geometry
from tl_fastload.errors import ArgumentError
from tl_fastload.placement.placer import Placer
from tl_fastload.recipes.nodes import SourceView
from tl_fastload.recipes.promise import Promise
from tl_fastload.recipes.slices import as_promise
from tl_fastload.report.available import check_room
from tl_fastload.report.progress import Progress
from tl_fastload.roads.road import Request
from tl_fastload.shards.fill import Sharding
from tl_fastload.shards.load import agreed, begin
from tl_fastload.source.reader import FileReader, FileSource


def place_parts(
    model: nn.Module, contents: Contents, reader: FileReader, request: Request
) -> tuple[int, Sharding]:
    """Put this process's part of every parameter into the model.

    Returns:
        The bytes of parameters that are mapped, and what makes the parts one model.

    Raises:
        ArgumentError: the copy is of quantized or shared weights.
    """
    options, manifest = request.options, contents.manifest
    recipes = _recipes(model, contents, reader)
    for name, (memory, place) in request.road.shared(model).views.items():
        recipes[name] = _view(recipes[memory], place)
    sharding = begin(options, model, recipes)
    assert sharding is not None  # there is a mesh
    device = sharding.ranks.device
    with Progress(options.progress) as progress:
        placer = Placer(
            model,
            lambda name: device,
            assign=True,
            maps=reader.maps,
            map_any_layout=True,
            progress=progress,
            strides_of=request.road.strides_in,
            order=str(layout_of(manifest, options)),
        )
        if options.check_memory:
            with agreed(options):
                mapped = placer.maps is not None and device.type == "cpu"
                check_room({} if mapped else {device: sharding.own_bytes()}, manifest.model_class)
        sharding.exchange(recipes)
        with agreed(options):
            placer.place(recipes)
    return placer.mapped_bytes, sharding


def _view(memory: Promise, place: torch.Tensor) -> Promise:
    """A part of a parameter that a copy holds."""
    node = memory.node
    assert isinstance(node, SourceView)
    offset = node.geometry.storage_offset() + place.storage_offset()
    geometry = node.geometry.as_strided(place.shape, place.stride(), offset)
    return as_promise(SourceView(node.source, geometry))


def _recipes(model: nn.Module, contents: Contents, reader: FileReader) -> dict[str, Promise]:
    homes: dict[str, str] = {}
    recipes: dict[str, Promise] = {}
    own: dict[str, Any] = dict(model.named_parameters())
    for name, view in contents.manifest.parameters.items():
        if view.quantized is not None:
            raise ArgumentError(
                f"{name} of the copy is quantized, and mesh= shares dense weights only: quantized "
                "bytes cannot be cut yet. Load it without mesh=, in each process."
            )
        entry = contents.entries[view.tensors[""]]
        other = homes.setdefault(view.tensors[""], name)
        if other != name:
            raise ArgumentError(
                f"{other} and {name} of the copy are one parameter, which mesh= would part. Save a "
                "model in which each has its own, or load it without mesh=."
            )
        own[name].requires_grad_(view.requires_grad)
        geometry = checked_geometry(view, entry)
        recipes[name] = as_promise(SourceView(FileSource(entry, reader), geometry))
    return recipes
