"""How much memory this process uses, and giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from tl_fastload.timeline import Phase, Recorder, StockPhases, Timeline

SAMPLE_SECONDS = 0.005

_LIBC: Any = ctypes.CDLL(None) if sys.platform.startswith("linux") else None


@dataclass(frozen=True)
class HostMemory:
    """Resident memory of this process, in bytes: all of it, and the part that no file backs."""

    resident_bytes: int
    anonymous_bytes: int


def host_memory() -> HostMemory:
    """Read this process's memory; without `/proc`, all resident memory counts as anonymous."""
    try:
        with Path("/proc/self/status").open(encoding="ascii") as status:
            fields = dict(line.split(":", 1) for line in status)
        return HostMemory(_kib(fields["VmRSS"]), _kib(fields["RssAnon"]))
    except (OSError, KeyError):
        resident = int(psutil.Process().memory_info().rss)
        return HostMemory(resident, resident)


def _kib(field: str) -> int:
    return int(field.split()[0]) * 1024


class PeakSampler:
    """Samples this process's memory in a thread; keeps the peaks above where it started, and a
    timeline.

    Attributes:
        peak_host_bytes: resident memory, file pages included.
        peak_anonymous_bytes: resident memory that no file backs.
        peak_device_bytes: CUDA memory allocated by torch on all devices, or None without CUDA.
    """

    def __init__(self) -> None:
        self.peak_host_bytes = 0
        self.peak_anonymous_bytes = 0
        self.peak_device_bytes: int | None = None
        self._recorder = Recorder()
        self._phases: list[Phase] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tl_fastload-memory", daemon=True)

    def __enter__(self) -> PeakSampler:
        self._start = host_memory()
        self._start_seconds = time.perf_counter()
        self._device_start = _device_start()
        self._recorder.add(0.0, 0, 0, *(() if self._device_start is None else (0,)))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()
        if self._device_start is not None:
            self.peak_device_bytes = max(
                torch.cuda.max_memory_allocated(i) - before
                for i, before in enumerate(self._device_start)
            )

    def sample(self) -> None:
        """Look once, now."""
        try:
            now = host_memory()
        except (OSError, MemoryError):  # no descriptor is left: a figure is not worth a load
            return
        resident_bytes = now.resident_bytes - self._start.resident_bytes
        anonymous_bytes = now.anonymous_bytes - self._start.anonymous_bytes
        self.peak_host_bytes = max(self.peak_host_bytes, resident_bytes)
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, anonymous_bytes)
        on_devices = () if self._device_start is None else (_device_growth(self._device_start),)
        seconds = time.perf_counter() - self._start_seconds
        self._recorder.add(seconds, resident_bytes, anonymous_bytes, *on_devices)

    def mark(self, phase: str) -> None:
        """A phase of the load begins."""
        self._phases.append(Phase(phase, time.perf_counter() - self._start_seconds))

    def timeline(self) -> Timeline:
        """Memory over the time watched, above its start."""
        return self._recorder.timeline(self._phases)

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.sample()


def watch_memory() -> PeakSampler:
    """Watch the memory of this process during a stock load, to draw it beside a lean one:

        with tl_fastload.watch_memory() as stock:
            HookedTransformer.from_pretrained("gpt2")
        model.load_report.plot(stock)

    Freed memory is given back to the system first, so that nothing hides in it.

    Returns:
        A context manager with `peak_host_bytes`, `peak_anonymous_bytes`, `peak_device_bytes` and
        `timeline()`.
    """
    return _StockSampler()


class _StockSampler(PeakSampler):
    def __enter__(self) -> PeakSampler:
        return_freed_memory()
        super().__enter__()
        self._stock = StockPhases().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stock.__exit__(*raised)
        super().__exit__(*raised)
        self._phases = self._stock.phases


def _device_growth(start: list[int]) -> int:
    return sum(torch.cuda.memory_allocated(i) - before for i, before in enumerate(start))


def _device_start() -> list[int] | None:
    if not torch.cuda.is_available():
        return None
    before = []
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)
        before.append(torch.cuda.memory_allocated(index))
    return before


def return_freed_memory() -> None:
    """Give freed heap memory back to the system, which glibc does not do by itself below its
    growing threshold.
    """
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def stored_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold a tensor's memory: several for a quantized one."""
    content = getattr(tensor, "content", None)
    return [tensor] if content is None else list(content.tensors().values())


def unique_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the elements that these tensors hold; tensors on the same elements count once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    parts = [part for tensor in tensors for part in stored_parts(tensor)]
    for tensor in parts:
        size = tensor.numel() * tensor.element_size()
        if (tensor.data_ptr(), size) not in seen:
            seen.add((tensor.data_ptr(), size))
            total += size
    return total
