"""Whether a frozen submodule is what it was when it was attached, or has been trained since."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tl_fastload.ground.wrappers import plain_name
from tl_fastload.lightning.fingerprint import changed_values, fingerprint, parameters_of
from tl_fastload.placement.values_here import has_values


@dataclass
class Baseline:
    """What the tensors of a submodule were.

    Counts of writes tell every in-place change of a tensor, some values of each (a fingerprint)
    what was changed behind torch's back or moved elsewhere.

    Attributes:
        values: the fingerprint of parameters and buffers.
        counts: name -> the tensor's identity and its count of writes.
        home: identity of the submodule; None in a copy, which has tensors of its own.
        unfrozen: names that were found with `requires_grad` on.
        known: names of which a module that this is a copy of has told already.
    """

    values: dict[str, Any]
    counts: dict[str, tuple[int, int]]
    home: int | None
    unfrozen: set[str] = field(default_factory=set)
    known: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, module: nn.Module) -> Baseline | None:
        """Of a module as it stands; None while it has no values."""
        tensors = _tensors(module)
        if not all(map(has_values, tensors.values())):
            return None
        return cls(fingerprint(tensors), _counts(tensors), id(module))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "home": None}

    def look(self, module: nn.Module) -> None:
        """Note what is unfrozen, and in a copy the copy's own tensors."""
        named = module.named_parameters(remove_duplicate=False)
        self.unfrozen |= {plain_name(name) for name, p in named if p.requires_grad}
        if self.home is None:
            self.known |= set(self.changed(module))
            self.counts, self.home = _counts(_tensors(module)), id(module)

    def written(self, module: nn.Module) -> list[str]:
        """Names of parameters that have been written to, whatever with."""
        if self.home is None:
            return []
        now = _counts(parameters_of(module))
        return [
            name
            for name, (identity, count) in now.items()
            if name in self.counts
            and self.counts[name][0] == identity
            and count > self.counts[name][1]
        ]

    def changed(self, module: nn.Module) -> list[str]:
        """Names of parameters and buffers that hold other values than they did."""
        tensors = _tensors(module)
        now = _counts(tensors)
        buffers = {plain_name(name) for name, _ in module.named_buffers(remove_duplicate=False)}
        # Tables are computed anew for a longer prompt: only what is still the same tensor counts.
        apart = changed_values(self.values, fingerprint(tensors))
        found = {
            name
            for name in apart
            if name not in buffers or self.counts.get(name, (0,))[0] == now[name][0]
        }
        return sorted(found | self.known)

    def trained(self, module: nn.Module, optimizers: Iterable[Any]) -> tuple[list[str], list[str]]:
        """What has changed for certain, and what was written to without a trace of another value.

        Args:
            module: the submodule.
            optimizers: that may have trained it; the state that they keep of a parameter, its
                gradient, or that it was unfrozen once, makes a write a certain change.
        """
        changed, doubtful = self.changed(module), self.written(module)
        states = [optimizer.state for optimizer in optimizers]
        own = parameters_of(module)
        for name in doubtful:
            parameter = own[name]
            has_state = any(parameter in state for state in states)
            if name in self.unfrozen or parameter.grad is not None or has_state:
                changed.append(name)
        return sorted(set(changed)), sorted(set(doubtful) - set(changed))


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    buffers = module.named_buffers(remove_duplicate=False)
    return {**{plain_name(name): b for name, b in buffers}, **parameters_of(module)}


def _counts(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    # Tensors of inference mode do not count.
    return {
        name: (id(tensor), 0 if tensor.is_inference() else tensor._version)
        for name, tensor in tensors.items()
    }
