"""Ways to a device that are none: they copy within the host, as early or as late as a bus may."""

from __future__ import annotations

import torch


class LateCopy:
    """A copy that is done when it is waited for, and not before."""

    def __init__(self, part: torch.Tensor, target: torch.Tensor) -> None:
        self._left = [(part, target)]

    def synchronize(self) -> None:
        while self._left:
            part, target = self._left.pop()
            target.copy_(part)


class LateBus:
    """Copies as late as a bus may."""

    def __init__(self) -> None:
        self.slots = 0
        self._sent: list[LateCopy] = []

    def slot(self, size_bytes: int) -> torch.Tensor:
        self.slots += 1
        return torch.empty(size_bytes, dtype=torch.uint8)

    def send(self, part: torch.Tensor, target: torch.Tensor) -> LateCopy:
        self._sent.append(LateCopy(part, target))
        return self._sent[-1]

    def finish(self) -> None:
        for copy in self._sent:
            copy.synchronize()


class PromptBus(LateBus):
    """Copies at once, as a stream does for what comes after in it."""

    def send(self, part: torch.Tensor, target: torch.Tensor) -> LateCopy:
        copy = super().send(part, target)
        copy.synchronize()
        return copy
