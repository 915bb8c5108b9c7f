"""A bridge of which several processes get a part each.

A part of a memory holds no part of its views: each parameter has memory of its own. Attributes that
are the same elements as a parameter look at it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tl_fastload.bridge.slots import ATTRIBUTE, Slot, Views
from tl_fastload.errors import ArgumentError
from tl_fastload.recipes.live import LivePromise, live_tensors
from tl_fastload.recipes.promise import Promise
from tl_fastload.roads.road import Shared


@dataclass
class Follower:
    """An attribute that is a parameter, or the same elements without a gradient.

    Attributes:
        slot: where it stands.
        name: of the parameter on the shelf.
        is_same: whether it is the parameter itself.
    """

    slot: Slot
    name: str
    is_same: bool

    def follow(self, owner: nn.Module, leaf: str) -> None:
        """Let it look at an entry of a module, of which FSDP2 makes the whole and the part."""

        def look(module: nn.Module) -> torch.Tensor | None:
            found = owner._parameters[leaf]
            return found if self.is_same or found is None else found.detach()

        module: Any = self.slot.module
        del module.__dict__[self.slot.leaf]
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), {self.slot.leaf: property(look)})


def shared_model(bridge: Any) -> Shared:
    """The bridge that several processes share; where its parameters stand is still to be said."""
    root = bridge.original_model
    # Models of text and pictures put both together by the rows of embeddings.
    is_composite = getattr(root.config, "text_config", None) is not None
    return Shared(bridge, root, is_composite, {})


def promise_all(slots: Iterable[Slot]) -> None:
    """Put promises in place of parameters that have values already, such as biases of zeros, and of
    what lies in their memory.
    """
    valued = [slot for slot in slots if not isinstance(slot.tensor, Promise)]
    own = {slot.tensor.untyped_storage()._cdata for slot in valued if slot.is_parameter}
    once: dict[int, LivePromise] = {}
    held = {
        str(number): slot.tensor
        for number, slot in enumerate(valued)
        if slot.tensor.untyped_storage()._cdata in own
    }
    for number, promise in live_tensors(held).items():
        slot = valued[int(number)]
        promise._is_param = slot.is_parameter
        slot.tensor = once.setdefault(id(held[number]), promise)


def parted(views: Views) -> list[Views]:
    """The parameters of one memory, each with the attributes that look at it among its parts.

    Raises:
        ArgumentError: a tensor that could not follow a parameter.
    """
    if not views.slots[0].is_parameter:
        return [views]
    own = {id(views.whole): Views(views.whole, views.slots, [])}
    for slot, promise in views.parts:
        if slot.is_parameter:
            own.setdefault(id(promise), Views(promise, [], [])).slots.append(slot)
    by_place = {place(one.whole.meta): one for one in reversed(own.values())}
    for slot, promise in views.parts:
        if not slot.is_parameter:
            if slot.kind != ATTRIBUTE or place(promise.meta) not in by_place:
                raise cannot_follow(slot.name)
            by_place[place(promise.meta)].parts.append((slot, promise))
    return list(own.values())


def place(meta: torch.Tensor) -> tuple[int, ...]:
    """Where a tensor lies in its memory."""
    return int(meta.storage_offset()), *meta.shape, *meta.stride()


def cannot_follow(name: str) -> ArgumentError:
    """The error for what would be no view of parts."""
    return ArgumentError(
        f"mesh= parts a bridge's parameters, and {name} is a piece of one that is none itself. "
        "Load the model without mesh=."
    )


def take_followers(views: Views, name: str) -> list[Follower]:
    """The attributes among the slots and the parts of a parameter, which are emptied."""
    attributes = [slot for slot in views.slots if slot.kind == ATTRIBUTE]
    found = [Follower(slot, name, is_same=True) for slot in attributes]
    found += [Follower(slot, name, is_same=False) for slot, _ in views.parts]
    views.slots[:] = [slot for slot in views.slots if slot.kind != ATTRIBUTE]
    views.parts.clear()
    for follower in found:
        follower.slot.tensor = None
    return found


def part_copy(shelf: Any, bridge: Any, slots: Mapping[str, Slot]) -> None:
    """Let several processes get a part each of what a copy holds.

    Args:
        shelf: of the copy's memories; gets the views of them that are parameters, and `shared`.
        bridge: the bridge on promises, which are taken out of it.
        slots: of the bridge.

    Raises:
        ArgumentError: a tensor that could not follow a parameter.
    """
    shared = shelf.shared_model = shared_model(bridge)
    wholes = dict(shelf.named_parameters())
    followers: list[Follower] = []
    homes: dict[Any, str] = {}
    for name, form in shelf.built["slots"].items():  # parameters first
        memory, same, slot = form["memory"], form["same"], slots.get(name)
        if slot is None or memory not in wholes:
            continue
        flat = torch.empty(wholes[memory].numel(), dtype=wholes[memory].dtype, device="meta")
        meta = flat.as_strided(form["shape"], form["strides"], form["offset"])
        home = homes.get((memory, place(meta)))
        if slot.is_parameter:
            homes.setdefault((memory, place(meta)), same)
            shared.places.setdefault(same, []).append((slot.module, slot.leaf))
            if same == name != memory:
                shared.views[name] = memory, meta
                shelf.put(name, nn.Parameter(meta, form["requires_grad"]), ())
        elif slot.kind == ATTRIBUTE and home is not None:
            followers.append(Follower(slot, home, is_same=same == home))
        else:
            raise cannot_follow(name)
        slot.tensor = None
    shared.follow = partial(follow_all, followers, shared.places)


def follow_all(
    followers: Iterable[Follower], places: dict[str, list[tuple[nn.Module, str]]]
) -> None:
    """Let attributes look at parameters, by where these stand in the bridge."""
    for follower in followers:
        follower.follow(*places[follower.name][0])
