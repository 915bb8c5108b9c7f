"""How much memory this process uses, and giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from tl_fastload.ground.sizes import bytes_of
from tl_fastload.report.timeline import Phase, Recorder, StockPhases, Timeline

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
        peak_device_bytes: CUDA memory allocated by torch on the fullest of the watched devices, or
            None without one. Exact where it is the process's highest so far; otherwise the highest
            of the samples, since the statistics of the process are not reset.

    Args:
        every_device: watch every CUDA device from the first sample on which CUDA is in use.
    """

    def __init__(self, every_device: bool = False) -> None:
        self.peak_host_bytes = 0
        self.peak_anonymous_bytes = 0
        self.peak_device_bytes: int | None = None
        self._every_device = every_device
        self._devices: dict[int, _Device] = {}
        self._recorder = Recorder()
        self._phases: list[Phase] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tl_fastload-memory", daemon=True)

    def __enter__(self) -> PeakSampler:
        self._start = host_memory()
        self._start_seconds = time.perf_counter()
        self._watch_every_device()
        self._recorder.add(0.0, 0, 0, 0)
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
        if self._devices:
            self.peak_device_bytes = max(one.peak() for one in self._devices.values())

    def watch(self, devices: Iterable[torch.device]) -> None:
        """Watch these devices from now on, as far as they are CUDA devices; others, and CUDA in a
        process that does not use it, are left alone.
        """
        for device in devices:
            if device.type == "cuda":
                index = _current_device() if device.index is None else device.index
                self._devices = {**self._devices, index: self._devices.get(index) or _Device(index)}

    def _watch_every_device(self) -> None:
        if self._every_device and not self._devices and cuda_is_in_use():
            self.watch(torch.device("cuda", i) for i in range(torch.cuda.device_count()))

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
        self._watch_every_device()
        device_bytes = sum(one.look() for one in self._devices.values())
        seconds = time.perf_counter() - self._start_seconds
        self._recorder.add(seconds, resident_bytes, anonymous_bytes, device_bytes)

    def mark(self, phase: str) -> None:
        """A phase of the load begins."""
        self._phases.append(Phase(phase, time.perf_counter() - self._start_seconds))

    def timeline(self) -> Timeline:
        """Memory over the time watched, above its start."""
        found = self._recorder.timeline(self._phases)
        return found if self._devices else replace(found, device_bytes=())

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
    return _StockSampler(every_device=True)


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


class _Device:
    """Memory that torch has allocated on one CUDA device, above what it had at first.

    Only read: the statistics belong to the process, and are all zero until CUDA is in use.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._start = self._allocated()
        self._highest_before = self._highest()
        self._seen = 0

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._index) if cuda_is_in_use() else 0

    def _highest(self) -> int:
        return torch.cuda.max_memory_allocated(self._index) if cuda_is_in_use() else 0

    def look(self) -> int:
        """What it is now."""
        growth = self._allocated() - self._start
        self._seen = max(self._seen, growth)
        return growth

    def peak(self) -> int:
        """The most that it was."""
        highest = self._highest()
        return highest - self._start if highest > self._highest_before else self._seen


def cuda_is_in_use() -> bool:
    """Whether this process uses CUDA already; not in a forked child, where it cannot."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _current_device() -> int:
    return torch.cuda.current_device() if cuda_is_in_use() else 0


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
        size = bytes_of(tensor)
        if (tensor.data_ptr(), size) not in seen:
            seen.add((tensor.data_ptr(), size))
            total += size
    return total
