"""How fast bytes reach the device from pinned and from pageable memory, and how fast the page
cache fills pinned buffers. What a load could reach is the lesser of the two.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.forward import synchronize
from benchmarks.gpu_report.checkpoints import checkpoint
from benchmarks.gpu_report.sections import Facts, Run
from tl_fastload.cli.bench.synthetic import weights_file

_THREADS = (1, 4, 8)
_READ_BYTES = 16 << 20
_CHUNK_BYTES = 4 << 20  # what a load moves at a time


def measure(run: Run) -> Facts:
    """Rates in 1e9 bytes per second; of casts, bytes of the bfloat16 file."""
    size = 1 << 20 if run.is_dry else 256 << 20
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=run.has_cuda).fill_(1)
    pageable = torch.ones(size, dtype=torch.uint8)
    there = torch.empty(size, dtype=torch.uint8, device=run.device)
    chunk = min(_CHUNK_BYTES, size)
    narrow, narrow_pinned = (whole[:chunk].view(torch.bfloat16) for whole in (pageable, pinned))
    wide = torch.empty(chunk // 2, dtype=torch.float32, device=run.device)
    bounce = there[:chunk].view(torch.bfloat16)

    def cast_there() -> None:
        bounce.copy_(narrow_pinned, non_blocking=True)
        wide.copy_(bounce)

    def rate(act: Callable[[], object], act_bytes: int, times: int) -> float:
        act()
        synchronize(run.device)
        began = time.perf_counter()
        for _ in range(times):
            act()
        synchronize(run.device)
        return round(act_bytes * times / 1e9 / (time.perf_counter() - began), 2)

    found: Facts = {
        "pinned_to_device": rate(lambda: there.copy_(pinned, non_blocking=True), size, 8),
        "pageable_to_device": rate(lambda: there.copy_(pageable), size, 3),
        "pageable_to_device_4MiB": rate(lambda: there[:chunk].copy_(pageable[:chunk]), chunk, 64),
        "device_to_pageable": rate(lambda: pageable.copy_(there), size, 3),
        "to_float32_cast_on_the_host": rate(lambda: wide.copy_(narrow), chunk, 32),
        "to_float32_cast_on_the_device": rate(cast_there, chunk, 64),
    }
    path = weights_file(checkpoint(run, "1b"))
    for threads in _THREADS:
        buffers = [
            torch.empty(_READ_BYTES, dtype=torch.uint8, pin_memory=run.has_cuda)
            for _ in range(threads)
        ]
        seconds = _fill(path, buffers)
        rate_found = round(path.stat().st_size / 1e9 / seconds, 2)
        found[f"page_cache_to_pinned_{threads}_threads"] = rate_found
    return found


def _fill(path: Path, buffers: list[torch.Tensor]) -> float:
    """Seconds to read a file once through buffers, each with a thread of its own."""
    turns, lock = iter(range(0, path.stat().st_size, _READ_BYTES)), threading.Lock()
    with path.open("rb", buffering=0) as file:

        def work(buffer: torch.Tensor) -> None:
            view = memoryview(buffer.numpy())
            while True:
                with lock:
                    at = next(turns, None)
                if at is None:
                    return
                os.preadv(file.fileno(), [view], at)

        team = [threading.Thread(target=work, args=(buffer,)) for buffer in buffers]
        began = time.perf_counter()
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
        return time.perf_counter() - began
