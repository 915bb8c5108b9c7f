"""In which memory order a processed copy is loaded, and which parameters have to change theirs."""

from __future__ import annotations

import torch
from torch import nn

from tl_fastload.copies.manifest import Manifest
from tl_fastload.ground.geometry import same_layout
from tl_fastload.request.options import DEFAULT_LAYOUT, Options
from tl_fastload.roads.known import road_of


def layout_of(manifest: Manifest, options: Options) -> str:
    """The memory order that a load of a copy gives: what is asked for, else as saved."""
    return manifest.layout if options.layout is DEFAULT_LAYOUT else options.layout


def moved(model: nn.Module, manifest: Manifest, options: Options) -> dict[str, tuple[int, ...]]:
    """The strides of parameters that are to have others than were saved: they are read.

    Args:
        model: whose parameters they are.
        manifest: of the copy.
        options: of the load.
    """
    order, found = layout_of(manifest, options), {}
    for name, view in manifest.parameters.items():
        if order != manifest.layout and view.quantized is None:
            module = model.get_submodule(name.rpartition(".")[0])
            shape = torch.Size(view.shape)
            strides = road_of(model).strides_in(order, module, name, shape)
            if not same_layout(shape, view.strides, strides):
                found[name] = strides
    return found
