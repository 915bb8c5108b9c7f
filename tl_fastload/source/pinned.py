"""Sends ranges of files to a CUDA device: threads fill a pinned buffer while others are on the bus.

Copies run in the stream of the caller, as does what computes with them: only a buffer has to wait,
for the copy out of it, which an event tells.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

SLOT_BYTES = 8 << 20
SLOTS = 4
_PART_BYTES = 1 << 20  # that one thread reads of a slot; less is read by the calling one
_MOST_THREADS = 8

Read = Callable[[Path, int, torch.Tensor], None]
"""Fills a one-dimensional uint8 tensor of the host with the bytes of a file from an offset on."""


class Bus(Protocol):
    """The way from host memory to one device."""

    def slot(self, size_bytes: int) -> torch.Tensor:
        """A buffer on the host that copies may leave by themselves."""

    def send(self, part: torch.Tensor, target: torch.Tensor) -> Any:
        """Begin a copy to the device; returns an event: `synchronize()` waits for its end."""

    def finish(self) -> None:
        """Wait for all copies."""


class CudaBus:
    """The bus of a CUDA device, in the stream that is current in the calling thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def slot(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def send(self, part: torch.Tensor, target: torch.Tensor) -> Any:
        target.copy_(part, non_blocking=True)
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def finish(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()


def bus_to(device: torch.device) -> Bus | None:
    """The bus to a device; None where bytes are copied without one."""
    return CudaBus(device) if device.type == "cuda" else None


class Ring:
    """Pinned buffers that are filled and sent in turn, by one thread.

    Args:
        bus: to the device.
        read: reads a file; several threads call it.

    Raises:
        RuntimeError: no memory can be pinned.
    """

    def __init__(self, bus: Bus, read: Read) -> None:
        self._bus = bus
        self._read = read
        self._slots = [bus.slot(SLOT_BYTES) for _ in range(SLOTS)]
        self._sent: list[Any] = [None] * SLOTS
        self._next = 0
        threads = min(_MOST_THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(threads, "tl_fastload-pinned")
        self._is_alone = False

    def send(self, path: Path, start: int, target: torch.Tensor) -> None:
        """Begin to fill a one-dimensional uint8 tensor of the device with the bytes of a file from
        `start` on; what its stream does next sees them.
        """
        for first in range(0, target.numel(), SLOT_BYTES):
            number, self._next = self._next, (self._next + 1) % SLOTS
            part = self._slots[number][: min(SLOT_BYTES, target.numel() - first)]
            if self._sent[number] is not None:
                self._sent[number].synchronize()
            self._fill(path, start + first, part)
            self._sent[number] = self._bus.send(part, target[first : first + part.numel()])

    def _fill(self, path: Path, start: int, slot: torch.Tensor) -> None:
        if slot.numel() <= _PART_BYTES or self._is_alone:
            self._read(path, start, slot)
            return
        parts = torch.split(slot, _PART_BYTES)
        places = range(start, start + slot.numel(), _PART_BYTES)
        try:
            filled = self._threads.map(self._read, [path] * len(parts), places, parts)
        except RuntimeError:  # no thread can be started any more
            self._is_alone = True
            self._threads.shutdown(wait=True, cancel_futures=True)  # those that were may be reading
            self._read(path, start, slot)
            return
        for _ in filled:
            pass  # and raise what a thread has met

    def close(self) -> None:
        """Wait for what is on its way."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._bus.finish()
