"""Where the tensors of a bridge stand, and which of them are one memory.

A bridge wraps a transformers model in place: the same module, and the same parameter, is reached by
several paths. A slot is one entry of one module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tl_fastload.recipes.live import LivePromise

PARAMETER, BUFFER, ATTRIBUTE = range(3)


@dataclass
class Slot:
    """One entry of a module's parameters or buffers, or one of its attributes.

    Attributes:
        name: dotted, as messages have it.
        module: the module.
        leaf: the entry's name in the module.
        kind: which of the module's dictionaries it stands in; PARAMETER, BUFFER or ATTRIBUTE.
    """

    name: str
    module: nn.Module
    leaf: str
    kind: int

    @property
    def tensor(self) -> Any:
        return self._entries[self.leaf]

    @tensor.setter
    def tensor(self, value: Any) -> None:
        self._entries[self.leaf] = value

    @property
    def _entries(self) -> dict[str, Any]:
        return _dictionaries(self.module)[self.kind]

    @property
    def is_parameter(self) -> bool:
        return self.kind == PARAMETER


def _dictionaries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module.__dict__


def slots_of(bridge: Any) -> list[Slot]:
    """Every tensor of a bridge and of the model that it wraps, under the wrapped model's names:
    parameters first, then buffers, then other names of the same memory.
    """
    found: list[Slot] = []
    seen: set[int] = set()
    for root in (bridge.original_model, bridge):
        for name, module in nn.Module.named_modules(root):
            if id(module) in seen:
                continue
            seen.add(id(module))
            prefix = "".join(
                f"{p}." for p in name.split(".") if p not in ("", "_original_component")
            )
            for kind, entries in enumerate(_dictionaries(module)):
                found += [
                    Slot(prefix + leaf, module, leaf, kind)
                    for leaf, tensor in entries.items()
                    if isinstance(tensor, torch.Tensor)
                ]
    found.sort(key=lambda slot: slot.kind)
    return found


@dataclass
class Views:
    """Tensors that lie in one memory: one of them that is all of it, and views of that.

    Attributes:
        whole: the promise that fills the memory.
        slots: where it stands.
        parts: slots of its views, each with its promise.
    """

    whole: LivePromise
    slots: list[Slot]
    parts: list[tuple[Slot, LivePromise]]


def by_memory(slots: list[Slot]) -> list[Views]:
    """The promises in these slots, those of one memory together.

    A view of a memory that no slot holds whole stands for itself.
    """
    holders: dict[int, list[tuple[Slot, LivePromise]]] = {}
    for slot in slots:
        promise = slot.tensor
        if isinstance(promise, LivePromise):
            promise.require_fresh()
            holders.setdefault(id(promise.home), []).append((slot, promise))
    found: list[Views] = []
    for entries in holders.values():
        whole = next((p for _, p in entries if p.fills_home and is_plain(p.meta)), None)
        if whole is not None:
            same = [slot for slot, p in entries if p is whole]
            found.append(Views(whole, same, [(s, p) for s, p in entries if p is not whole]))
            continue
        alone: dict[int, Views] = {}
        for slot, promise in entries:
            one = alone.setdefault(id(promise), Views(promise, [], []))
            one.slots.append(slot)
        found += alone.values()
    return found


def is_plain(meta: torch.Tensor) -> bool:
    """Whether each element of a tensor's memory is one element of it."""
    reach = sum((n - 1) * step for n, step in zip(meta.shape, meta.stride(), strict=True)) + 1
    return meta.numel() == reach or meta.numel() == 0
