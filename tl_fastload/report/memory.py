"""How much memory this process uses, and giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import operator
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil
import torch

from tl_fastload.ground.cores import pause
from tl_fastload.ground.geometry import span
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.report.timeline import PhaseWatch, Recorder, Timeline

SAMPLE_SECONDS = 0.005
_STATUS_FIELDS = (b"VmRSS:", b"RssAnon:", b"RssFile:", b"VmHWM:")

_LIBC: Any = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
Sampling = TypeVar("Sampling", bound="PeakSampler")


class HostMemory(NamedTuple):
    """Memory of a process, in bytes.

    Attributes:
        resident_bytes: all that is resident.
        anonymous_bytes: the part of it that is no page of a file.
        file_bytes: the part that is pages of files.
        highest_bytes: the most that was ever resident, by the kernel's own mark.
    """

    resident_bytes: int = 0
    anonymous_bytes: int = 0
    file_bytes: int = 0
    highest_bytes: int = 0


def host_memory(process: int | None = None) -> HostMemory:
    """Read the memory of a process; without `/proc`, all resident memory counts as anonymous.

    Args:
        process: its number; None for this one.
    """
    try:
        status = Path(f"/proc/{process or 'self'}/status").read_bytes()
        return HostMemory(*(_bytes(status, name) for name in _STATUS_FIELDS))
    except (OSError, ValueError):
        resident = int(psutil.Process(process).memory_info().rss)
        return HostMemory(resident, resident)


def _bytes(status: bytes, name: bytes) -> int:
    start = status.index(name) + len(name)
    return int(status[start : status.index(b"kB", start)]) * 1024


class PeakSampler(PhaseWatch):
    """Samples the memory of a process in a thread; keeps the peaks above where it started, and a
    timeline.

    Attributes:
        peak: the highest of each figure, above its start.
        peak_device_bytes: CUDA memory allocated by torch on the fullest of the watched devices, or
            None without one. Exact where it is the process's highest so far; otherwise the highest
            of the samples, since the statistics of the process are not reset.
        samples: how often it has looked.

    Args:
        of_stock: tell the phases of a stock load, and watch every CUDA device from the first sample
            on which CUDA is in use.
        process: the number of the process; None for this one.
        every_seconds: how long to wait between samples; `SAMPLE_SECONDS` by default.
    """

    def __init__(
        self,
        of_stock: bool = False,
        process: int | None = None,
        every_seconds: float | None = None,
    ) -> None:
        super().__init__(every_seconds or SAMPLE_SECONDS)
        self.peak = HostMemory()
        self.peak_device_bytes: int | None = None
        self.samples = 0
        self._process = process
        self._of_stock = of_stock
        self._devices: dict[int, _Device] = {}
        self._recorder = Recorder()

    @property
    def peak_host_bytes(self) -> int:
        """The peak of resident memory, file pages included."""
        return self.peak.resident_bytes

    @property
    def peak_anonymous_bytes(self) -> int:
        """The peak of anonymous memory: the process's own, no pages of files."""
        return self.peak.anonymous_bytes

    def __enter__(self: Sampling) -> Sampling:
        if self._of_stock:
            return_freed_memory()
        self._start = host_memory(self._process)
        self._watch_every_device()
        self._recorder.add(0.0, 0, 0, 0)
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        self.look()
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
        if self._of_stock and not self._devices and cuda_is_in_use():
            self.watch(torch.device("cuda", i) for i in range(torch.cuda.device_count()))

    def growth(self) -> HostMemory:
        """What the process holds now, above its start."""
        return HostMemory(*map(operator.sub, host_memory(self._process), self._start))

    def look(self) -> None:
        if self._of_stock:
            super().look()
        try:
            growth = self.growth()
        except (OSError, MemoryError, psutil.Error):
            return  # no descriptor is left, or the process has ended: a figure is not worth a load
        self.samples += 1
        self.peak = HostMemory(*map(max, self.peak, growth))
        self._watch_every_device()
        device_bytes = sum(one.look() for one in self._devices.values())
        self._recorder.add(
            self.seconds(), growth.resident_bytes, growth.anonymous_bytes, device_bytes
        )

    def timeline(self) -> Timeline:
        """Memory over the time watched, above its start."""
        found = self._recorder.timeline(self.phases)
        return found if self._devices else replace(found, device_bytes=())


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
    return PeakSampler(of_stock=True)


class _Device:
    """Memory that torch has allocated on one CUDA device, above what it had at first.

    Only read: the statistics belong to the process, and are all zero until CUDA is in use.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._start, self._highest_before = self._read()
        self._seen = 0

    def _read(self) -> tuple[int, int]:
        """What is allocated, and the most that ever was."""
        if not cuda_is_in_use():
            return 0, 0
        index = self._index
        return torch.cuda.memory_allocated(index), torch.cuda.max_memory_allocated(index)

    def look(self) -> int:
        """What it is now."""
        growth = self._read()[0] - self._start
        self._seen = max(self._seen, growth)
        return growth

    def peak(self) -> int:
        """The most that it was."""
        highest = self._read()[1]
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


_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of madvise(2), Linux 5.14
_PAGE_BYTES = 4096
_ADVISED_BYTES = 2 << 20


def bring_in_pages(address: int, size_bytes: int) -> None:
    """Have the system put pages behind memory that is about to be filled: all at once, which costs
    half of what they cost one by one when they are touched. Does nothing where it cannot.
    """
    if not hasattr(_LIBC, "madvise"):
        return
    start = -(-address // _PAGE_BYTES) * _PAGE_BYTES
    stop = (address + size_bytes) // _PAGE_BYTES * _PAGE_BYTES
    while start < stop:
        pause()
        length = min(_ADVISED_BYTES, stop - start)
        advice = ctypes.c_void_p(start), ctypes.c_size_t(length), _POPULATE_WRITE
        if _LIBC.madvise(*advice):  # an older system; or no memory, which the write will say
            return
        start += length


def stored_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold a tensor's memory in this process: several for a quantized one, one
    part of a DTensor.
    """
    content = getattr(tensor, "content", None)
    tensor = getattr(tensor, "_local_tensor", tensor)
    return [tensor] if content is None else list(content.tensors().values())


def unique_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the elements that these tensors hold; tensors on the same elements count once."""
    parts = [part for tensor in tensors for part in stored_parts(tensor)]
    return sum(bytes_of(parts[number]) for number in each_once(parts))


def each_once(tensors: Sequence[torch.Tensor]) -> list[int]:
    """The numbers of tensors that are not empty and do not lie in another one's memory, as Q, K and
    V do in the matrix that they are views of.
    """
    spans = []
    for number, tensor in enumerate(tensors):
        start, size = tensor.data_ptr(), bytes_of(tensor)
        if size and tensor.layout == torch.strided:
            size = span(tensor) * tensor.element_size()
        if size:
            spans.append((str(tensor.device), start, -(start + size), number))
    found, device, reached = [], "", 0
    for where, start, end, number in sorted(spans):  # the first at an address is the longest
        if where != device or -end > reached or start == 0:
            found.append(number)
            reached = -end if where != device else max(reached, -end)
            device = where
    return sorted(found)
