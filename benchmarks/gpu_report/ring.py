"""The least that a load onto a device can do where the bus is kept busy: threads fill pinned slots,
a stream of its own empties them, and a slot is filled again when its copy is done. No cast, no
processing: a floor, to hold the package's own loads against.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tl_fastload.source.safetensors import read_header

SLOT_BYTES = 16 << 20


class _Job(NamedTuple):
    """Bytes of the file from `start` on, and where they go."""

    start: int
    target: torch.Tensor


def make_slots(count: int, device: torch.device) -> list[torch.Tensor]:
    """Buffers on the host, pinned for a CUDA device."""
    pinned = device.type == "cuda"
    return [torch.empty(SLOT_BYTES, dtype=torch.uint8, pin_memory=pinned) for _ in range(count)]


def load(
    path: Path, device: torch.device, slots: list[torch.Tensor], threads: int
) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors file on a device, in the file's dtype."""
    final, jobs = {}, []
    for key, entry in read_header(path).items():
        final[key] = torch.empty(entry.shape, dtype=entry.dtype, device=device)
        parts = final[key].view(-1).view(torch.uint8).split(SLOT_BYTES)
        jobs += [_Job(entry.offset + i * SLOT_BYTES, part) for i, part in enumerate(parts)]
    free: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    ready: queue.SimpleQueue[tuple[_Job, int] | BaseException] = queue.SimpleQueue()
    for number in range(len(slots)):
        free.put((number, None))
    with path.open("rb", buffering=0) as file:
        turns, lock = iter(jobs), threading.Lock()
        work = (file.fileno(), turns, lock, slots, free, ready)
        team = [threading.Thread(target=_fill, args=work, daemon=True) for _ in range(threads)]
        for thread in team:
            thread.start()
        _empty(len(jobs), device, slots, free, ready)
        for thread in team:
            thread.join()
    return final


def _fill(
    descriptor: int,
    turns: Iterator[_Job],
    lock: threading.Lock,
    slots: list[torch.Tensor],
    free: queue.SimpleQueue[tuple[int, Any]],
    ready: queue.SimpleQueue[tuple[_Job, int] | BaseException],
) -> None:
    try:
        while True:
            with lock:
                job = next(turns, None)
            if job is None:
                return
            number, event = free.get()
            if event is not None:
                event.synchronize()
            view = memoryview(slots[number].numpy())[: job.target.numel()]
            while view:
                count = os.preadv(descriptor, [view], job.start + job.target.numel() - len(view))
                if not count:
                    raise EOFError("the checkpoint file is shorter than its header says")
                view = view[count:]
            ready.put((job, number))
    except BaseException as error:  # raised where the slots are emptied
        ready.put(error)


def _empty(
    jobs: int,
    device: torch.device,
    slots: list[torch.Tensor],
    free: queue.SimpleQueue[tuple[int, Any]],
    ready: queue.SimpleQueue[tuple[_Job, int] | BaseException],
) -> None:
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    if side is not None:
        side.wait_stream(torch.cuda.current_stream(device))
    for _ in range(jobs):
        found = ready.get()
        if isinstance(found, BaseException):
            raise found
        job, number = found
        event = None
        with torch.cuda.stream(side):  # does nothing without a stream
            job.target.copy_(slots[number][: job.target.numel()], non_blocking=True)
            if side is not None:
                event = side.record_event()
        free.put((number, event))
    if side is not None:
        torch.cuda.current_stream(device).wait_stream(side)
        side.synchronize()
