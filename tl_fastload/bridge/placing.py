"""Recipes into the slots of a bridge, each memory once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tl_fastload.bridge.slots import Slot, Views, by_memory, slots_of
from tl_fastload.placement.placer import Placer
from tl_fastload.recipes.nodes import dense_strides
from tl_fastload.recipes.promise import Promise
from tl_fastload.report.progress import Progress
from tl_fastload.source.reader import FileMaps


class Shelf(nn.Module):
    """What a Placer fills: an empty tensor under the name of each memory."""

    def __init__(self) -> None:
        super().__init__()
        self.strides: dict[str, tuple[int, ...]] = {}
        self.homes: dict[str, torch.device] = {}

    def add(self, views: Views) -> str:
        """Take the place of a memory; returns the name."""
        slot, promise = views.slots[0], views.whole
        name = slot.name
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            if part not in owner._modules:
                owner._modules[part] = nn.Module()
            child = owner._modules[part]
            assert child is not None
            owner = child
        while leaf in owner._parameters or leaf in owner._buffers:
            leaf += "_"  # two modules under one name
        name = ".".join((*path, leaf))
        self.strides[name] = tuple(dense_strides(promise.meta))
        self.homes[name] = promise.device
        if not slot.is_parameter:
            owner._buffers[leaf] = torch.empty_strided(
                promise.shape, self.strides[name], dtype=promise.dtype, device="cpu"
            )
        else:
            empty = torch.empty(promise.shape, dtype=promise.dtype, device="meta")
            owner._parameters[leaf] = nn.Parameter(empty, requires_grad=promise.requires_grad)
        return name

    def tensor(self, name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        owner = self.get_submodule(path)
        found = owner._buffers[leaf] if leaf in owner._buffers else owner._parameters[leaf]
        assert found is not None
        return found


def place(
    bridge: Any,
    device: torch.device | None,
    *,
    maps: FileMaps | None,
    is_raw: bool,
    progress: Progress,
    written: Callable[[list[Slot]], None] = lambda slots: None,
) -> Placer:
    """Put values into every slot that holds a promise.

    Args:
        bridge: the bridge; its slots are emptied first, so that a promise, and what it is made
            from, lives until it is placed and no longer.
        device: where the values go; None leaves each on the device of what it is made from.
        maps: where file ranges that are a parameter as they stand are mapped, or None.
        is_raw: nothing was processed, so that most of the model is mapped.
        progress: told of each parameter.
        written: told of the slots of each memory when they get their values.
    """
    shelf = Shelf()
    placed = {shelf.add(views): views for views in by_memory(slots_of(bridge))}
    recipes: dict[str, Promise] = {name: views.whole for name, views in placed.items()}
    homes: dict[str, _Home] = {name: _Home(views) for name, views in placed.items()}
    placed.clear()

    def writing(name: str) -> None:
        written(homes[name].slots)

    placer = Placer(
        shelf,
        lambda name: device or shelf.homes[name],
        assign=True,
        maps=maps,
        map_any_layout=is_raw,
        progress=progress,
        strides_of=_strides_of(shelf),
        writing=writing,
    )
    try:
        placer.place(recipes)
    finally:
        for name, home in homes.items():
            tensor = shelf.tensor(name)
            if not tensor.is_meta:
                home.fill(tensor, placer.device_of(name))
    return placer


def _strides_of(shelf: Shelf) -> Callable[[str, nn.Module, str, torch.Size], tuple[int, ...]]:
    names = {
        (id(shelf.get_submodule(name.rpartition(".")[0])), name.rpartition(".")[2]): strides
        for name, strides in shelf.strides.items()
    }

    def strides_of(
        order: str, module: nn.Module, leaf: str, shape: torch.Size
    ) -> tuple[int, ...]:
        return names[id(module), leaf]

    return strides_of


class _Home:
    """The slots of one memory, emptied; knows the forms of the views, and holds no promise."""

    def __init__(self, views: Views) -> None:
        self.whole = views.slots
        self.parts = [(s, p.meta, p.requires_grad, p._is_param) for s, p in views.parts]
        shared: dict[int, int] = {}
        # One parameter in two slots stays one.
        self.same = [shared.setdefault(id(p), number) for number, (_, p) in enumerate(views.parts)]
        for slot in self.slots:
            slot.tensor = None

    @property
    def slots(self) -> list[Slot]:
        return [*self.whole, *(part[0] for part in self.parts)]

    def fill(self, tensor: torch.Tensor, device: torch.device) -> None:
        """Put the placed value into its slots, and views of it into theirs."""
        if not self.whole[0].is_parameter:
            tensor = tensor.to(device)
        for slot in self.whole:
            slot.tensor = tensor
        made: list[torch.Tensor] = []
        for number, (slot, meta, trainable, is_parameter) in enumerate(self.parts):
            if self.same[number] < number:
                made.append(made[self.same[number]])
            else:
                offset = tensor.storage_offset() + meta.storage_offset()
                view = tensor.detach().as_strided(meta.shape, meta.stride(), offset)
                made.append(nn.Parameter(view, trainable) if is_parameter else view)
            slot.tensor = made[-1]
