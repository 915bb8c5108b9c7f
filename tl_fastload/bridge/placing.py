"""Recipes into the slots of a bridge, each memory once.

A Placer fills modules by name. The shelf is such a module: one tensor for each memory of a bridge,
under the name of the first slot that it belongs to. When it is full, its tensors go into the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from tl_fastload.bridge import names
from tl_fastload.bridge.quantizing import role_in
from tl_fastload.bridge.sharing import (
    Follower,
    follow_all,
    parted,
    promise_all,
    shared_model,
    take_followers,
)
from tl_fastload.bridge.slots import Slot, Views, by_memory, slots_of
from tl_fastload.ground.geometry import dense_strides, strides_of_order
from tl_fastload.ground.role import Role, RoleOf
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.recipes.evaluate import operands
from tl_fastload.recipes.nodes import Call, Node, SourceView, aten
from tl_fastload.recipes.promise import Promise
from tl_fastload.roads.road import Shared
from tl_fastload.source.reader import FileSource

_ALLOCATED_AT = 64
_SMALL_BYTES = 64 << 10


class Shelf(nn.Module):
    """What a Placer fills in place of a bridge.

    Attributes:
        strides: of each own parameter and buffer, as TransformerLens would have them; none for one
            of which several processes get a part each, which is row-major.
        cfg: of the bridge that it stands for.
        finish: puts what was filled into that bridge, and returns it; given where what has some
            name lies.
        shared_model: what several processes share; only if they do.
    """

    cfg: Any
    finish: Callable[[Callable[[str], torch.device]], Any]
    shared_model: Shared

    def __init__(self) -> None:
        super().__init__()
        self.strides: dict[str, tuple[int, ...]] = {}

    @property
    def is_shared(self) -> bool:
        """Whether several processes get a part each."""
        return "shared_model" in self.__dict__

    def aliases(self) -> dict[str, list[str]]:
        """The parameters of the bridge that lie in each memory, by the name of that."""
        return {}

    def role(self, name: str) -> Role:
        """What a parameter is."""
        return names.role(name)

    def put(self, name: str, tensor: torch.Tensor, strides: tuple[int, ...]) -> str:
        """Add a parameter or a buffer; returns its name, which no other one has."""
        *path, leaf = name.split(".")
        owner: Shelf = self
        for part in path:
            owner = owner._modules.setdefault(part, Shelf())  # type: ignore[assignment]
        while leaf in owner._parameters or leaf in owner._buffers:
            leaf += "_"  # two modules under one name
        owner.strides[leaf] = strides
        if isinstance(tensor, nn.Parameter):
            owner._parameters[leaf] = tensor
        else:
            owner._buffers[leaf] = tensor
        return ".".join((*path, leaf))


class BridgeShelf(Shelf):
    """The shelf of a bridge, whose slots are empty from now on: a promise, and what it is made
    from, lives until it is placed and no longer.

    Args:
        bridge: the bridge.
        is_raw: nothing was processed.
        on_meta: whether parameters are put in (and not copied into).
        is_shared: whether several processes get a part each.

    Attributes:
        cfg: the bridge's.
        recipes: name on the shelf -> recipe; who places them takes them away.
        devices: name -> where what it is made from lies.
    """

    def __init__(
        self, bridge: Any, *, is_raw: bool, on_meta: bool = True, is_shared: bool = False
    ) -> None:
        super().__init__()
        self.cfg = bridge.cfg
        self.recipes: dict[str, Promise] = {}
        self.devices: dict[str, torch.device] = {}
        self._homes: dict[str, _Home] = {}
        if is_shared:
            self.shared_model = shared_model(bridge)
        followers: list[Follower] = []
        for views in self._memories(bridge):
            name = self._add(views, on_meta)
            if is_shared and views.slots[0].is_parameter:
                followers += take_followers(views, name)
                self.shared_model.places[name] = [(slot.module, slot.leaf) for slot in views.slots]
            self.recipes[name], self.devices[name] = views.whole, views.whole.device
            if not is_raw:
                self.recipes[name] = _as_allocated(views.whole)
            self._homes[name] = _Home(views)
        if is_shared:
            self.shared_model.follow = partial(follow_all, followers, self.shared_model.places)
        _read_once(self.recipes.values())

    def _memories(self, bridge: Any) -> list[Views]:
        slots = slots_of(bridge)
        if not self.is_shared:
            return by_memory(slots)
        promise_all(slots)
        return [one for views in by_memory(slots) for one in parted(views)]

    def _add(self, views: Views, on_meta: bool) -> str:
        slot, promise = views.slots[0], views.whole
        strides = dense_strides(promise.meta)
        device = "meta" if on_meta and slot.is_parameter else "cpu"
        empty = torch.empty_strided(promise.shape, strides, dtype=promise.dtype, device=device)
        if slot.is_parameter:
            empty = nn.Parameter(empty, requires_grad=promise.requires_grad)
        return self.put(slot.name, empty, () if self.is_shared else strides)

    def aliases(self) -> dict[str, list[str]]:
        homes = self._homes.items()
        return {name: [s.name for s in home.slots if s.is_parameter] for name, home in homes}

    def role(self, name: str) -> Role:
        """As the module that holds it has it."""
        return role_in(name, self._homes[name].slots[0].module, self._homes)

    def slots(self, name: str) -> list[Slot]:
        """The slots that a value goes into."""
        return self._homes[name].slots

    def clear(self) -> None:
        """Put what is full into its slots."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, home in self._homes.items():
            if not tensors[name].is_meta:
                home.fill(tensors[name])


def _read_once(recipes: Iterable[Promise]) -> None:
    """Make one node of all views of the same elements: what several recipes of a group read is
    read once, for the small ones first.
    """
    known: dict[Any, SourceView] = {}
    seen: set[Node] = set()
    todo = [recipe.node for recipe in recipes]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, Call):
            node.args = tuple(_known(argument, known) for argument in node.args)
        todo += operands(node)


def _known(argument: Any, known: dict[Any, SourceView]) -> Any:
    if isinstance(argument, list):
        return [_known(item, known) for item in argument]
    if not isinstance(argument, SourceView):
        return argument
    form = argument.geometry
    key = argument.source, form.shape, form.stride(), form.storage_offset(), argument.casts
    return known.setdefault(key, argument)


def _as_allocated(promise: Promise) -> Promise:
    """A recipe that makes memory of its own for a small tensor that lies anywhere in a file."""
    node = promise.node
    if not isinstance(node, SourceView) or not isinstance(node.source, FileSource):
        return promise
    offset = node.geometry.storage_offset() * node.geometry.element_size()
    if not is_small_and_odd(int(node.source.entry.offset + offset), promise):
        return promise
    copied = Call(aten.clone.default, (node,), {}, promise.meta)
    return type(promise)(copied, promise.meta, promise.device)


def is_small_and_odd(address: int, tensor: torch.Tensor) -> bool:
    """Whether a tensor at this address is not kept where it lies.

    TransformerLens' processing copies what it does not change, and products with one row round
    otherwise where memory begins otherwise.
    """
    return address % _ALLOCATED_AT != 0 and bytes_of(tensor) <= _SMALL_BYTES


def roles_in(model: nn.Module) -> RoleOf:
    """What the parameters of a shelf, or of a bridge, are."""
    return model.role if isinstance(model, Shelf) else names.role


def strides_in(order: str, module: nn.Module, name: str, shape: torch.Size) -> tuple[int, ...]:
    """Strides of a parameter on a shelf, or of a bridge, which has one memory order: its own."""
    leaf = name.rpartition(".")[2]
    if isinstance(module, Shelf):
        return module.strides[leaf] or strides_of_order(shape, range(len(shape)))
    return tuple(getattr(module, leaf).stride())


def _view(tensor: torch.Tensor, meta: torch.Tensor, offset: int) -> torch.Tensor:
    if isinstance(tensor, QuantizedTensor):
        # Rows are taken out once, not at each product; successive ones stay shared.
        place = meta.shape, meta.stride(), offset
        return QuantizedTensor.of_view(tensor.content, *place, tensor.dtype).compact()
    return tensor.detach().as_strided(meta.shape, meta.stride(), offset)


class _Home:
    """The slots of one memory, emptied; knows the forms of the views, and holds no promise."""

    def __init__(self, views: Views) -> None:
        self._whole = views.slots
        self._parts = [(s, p.meta, p.requires_grad, p._is_param) for s, p in views.parts]
        # One tensor in two slots stays one.
        numbers: dict[int, int] = {}
        self._same = [numbers.setdefault(id(p), n) for n, (_, p) in enumerate(views.parts)]
        for slot in self.slots:
            slot.tensor = None

    @property
    def slots(self) -> list[Slot]:
        return [*self._whole, *(part[0] for part in self._parts)]

    def fill(self, tensor: torch.Tensor) -> None:
        """Put the value into its slots, and views of it into theirs."""
        for slot in self._whole:
            slot.tensor = tensor
        made: list[torch.Tensor] = []
        for same, (slot, meta, trainable, is_parameter) in zip(
            self._same, self._parts, strict=True
        ):
            if same == len(made):
                offset = int(tensor.storage_offset() + meta.storage_offset())
                view: Any = _view(tensor, meta, offset)
                trainable = trainable and not isinstance(view, QuantizedTensor)
                made.append(nn.Parameter(view, trainable) if is_parameter else view)
            else:
                made.append(made[same])
            slot.tensor = made[-1]
