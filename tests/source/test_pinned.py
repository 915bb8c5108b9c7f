"""Bytes on their way to a device: no buffer is filled anew before what it held has left it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.buses import LateBus, LateCopy, PromptBus
from tests.support.programs import assert_same
from tl_fastload.errors import CheckpointError
from tl_fastload.source import pinned
from tl_fastload.source import reader as reading
from tl_fastload.source.pinned import Ring
from tl_fastload.source.reader import FileReader, FileSource
from tl_fastload.source.safetensors import TensorEntry

SIZE = 1000


@pytest.fixture(autouse=True)
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "SLOT_BYTES", 64)
    monkeypatch.setattr(pinned, "_PART_BYTES", 16)
    monkeypatch.setattr(reading, "WINDOW_BYTES", 256)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(number * 7 % 251 for number in range(SIZE)))
    return path


@pytest.fixture
def reader() -> Iterator[FileReader]:
    made = FileReader()
    made.bus_to = lambda device: PromptBus()
    yield made
    made.close()


def in_file(file: Path, start: int, stop: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(file.read_bytes()[start:stop]), dtype=torch.uint8)


def test_a_buffer_is_filled_anew_only_when_it_has_been_copied(file: Path) -> None:
    reader, bus = FileReader(), LateBus()
    ring = Ring(bus, reader.read)
    ranges = [(0, SIZE), (3, 70), (500, 501), (10, 900)]
    targets = [torch.zeros(stop - start, dtype=torch.uint8) for start, stop in ranges]
    for (start, _), target in zip(ranges, targets, strict=True):
        ring.send(file, start, target)
    ring.close()
    reader.close()
    assert bus.slots == pinned.SLOTS
    for (start, stop), target in zip(ranges, targets, strict=True):
        assert_same(target, in_file(file, start, stop))


def test_a_file_that_ends_early_is_an_error_in_the_thread_that_loads(file: Path) -> None:
    reader, bus = FileReader(), LateBus()
    ring = Ring(bus, reader.read)
    with pytest.raises(CheckpointError, match="ended"):
        ring.send(file, SIZE - 40, torch.zeros(64, dtype=torch.uint8))
    ring.close()
    reader.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("tl_fastload-pinned")]


def test_files_are_closed_and_rings_end_whatever_fails_there(file: Path) -> None:
    class FailingBus(PromptBus):
        def finish(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    reader = FileReader()
    buses = [FailingBus(), FailingBus()]
    reader.bus_to = lambda device: buses.pop()
    for device in ("cpu", "meta"):
        ring = reader.ring(torch.device(device))
        assert ring is not None
        ring.send(file, 0, torch.zeros(SIZE, dtype=torch.uint8))
    descriptor = reader.files.descriptor(file)
    with pytest.raises(RuntimeError, match="illegal memory"):
        reader.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert not [one for one in threading.enumerate() if one.name.startswith("tl_fastload-pinned")]
    reader.close()  # there is nothing left to close


@pytest.mark.parametrize("startable", [0, 2])
def test_without_threads_the_one_that_loads_reads(
    monkeypatch: pytest.MonkeyPatch, file: Path, startable: int
) -> None:
    start, left = threading.Thread.start, [startable]

    def start_some(thread: threading.Thread) -> None:
        if thread.name.startswith("tl_fastload-pinned"):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    reader, bus = FileReader(), LateBus()

    def read_late(path: Path, at: int, out: torch.Tensor) -> None:
        time.sleep(0.01)
        reader.read(path, at, out)

    ring, target = Ring(bus, read_late), torch.zeros(SIZE, dtype=torch.uint8)
    ring.send(file, 0, target)
    ring.close()
    reader.close()
    assert_same(target, in_file(file, 0, SIZE))


def source_of(file: Path, reader: FileReader) -> tuple[FileSource, torch.Tensor]:
    """The file as 20 rows of 12 numbers, from byte 8 on; and what it holds."""
    entry = TensorEntry("rows", torch.float32, (20, 12), file, 8, 960)
    return FileSource(entry, reader), in_file(file, 8, 968).view(torch.float32).view(20, 12)


@pytest.mark.parametrize("casts", [(), (torch.float64,), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("part", ["whole", "rows", "columns", "turned", "one"])
def test_every_view_arrives_as_it_is_in_the_file(
    file: Path, reader: FileReader, part: str, casts: tuple[torch.dtype, ...]
) -> None:
    source, values = source_of(file, reader)
    views = {
        "whole": lambda x: x,
        "rows": lambda x: x[3:9],
        "columns": lambda x: x[:, 2:7],
        "turned": lambda x: x.T,
        "one": lambda x: x[4, 5],
    }
    geometry = views[part](torch.empty(20, 12, device="meta"))
    expected = views[part](values)
    for dtype in casts:
        expected = expected.to(dtype)
    out = torch.empty(expected.shape, dtype=expected.dtype)
    source.read_into(out, geometry, casts)
    assert_same(out, expected.contiguous())


def test_parts_of_one_matrix_send_it_once(file: Path, reader: FileReader) -> None:
    sent = 0

    class CountingBus(PromptBus):
        def send(self, part: torch.Tensor, target: torch.Tensor) -> LateCopy:
            nonlocal sent
            sent += part.numel()
            return super().send(part, target)

    reader.bus_to = lambda device: CountingBus()
    source, values = source_of(file, reader)
    geometry = torch.empty(20, 12, device="meta")[:5]  # in one window
    for columns in (slice(0, 12, 2), slice(0, 12, 2)):
        out = torch.empty(5, 6)
        source.read_into(out, geometry[:, columns], ())
        assert_same(out, values[:5, columns].contiguous())
    assert sent == 4 * (4 * 12 + 11)


def test_without_memory_to_pin_bytes_go_through_the_host(file: Path, reader: FileReader) -> None:
    class NoBus(PromptBus):
        def slot(self, size_bytes: int) -> torch.Tensor:
            raise RuntimeError("CUDA error: OS call failed or operation not supported on this OS")

    reader.bus_to = lambda device: NoBus()
    source, values = source_of(file, reader)
    out = torch.empty(20, 12)
    source.read_into(out, torch.empty(20, 12, device="meta"), ())
    assert_same(out, values)
    assert reader.ring(torch.device("cpu")) is None
