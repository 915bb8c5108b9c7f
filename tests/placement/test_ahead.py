"""Weights are read in a thread of their own, before they are needed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.forks import in_fork
from tests.support.programs import CPU, assert_same, in_file
from tl_fastload.errors import CheckpointError
from tl_fastload.ground.geometry import strides_of_order
from tl_fastload.placement.placer import Placer
from tl_fastload.report.progress import Progress
from tl_fastload.source import reader as reader_module
from tl_fastload.source.reader import FileReader, FileSource

COUNT = 8
SIDE = 300  # large enough for a block of its own


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for number in range(COUNT):
            self.register_parameter(f"w{number}", nn.Parameter(torch.empty(SIDE, SIDE)))


def matrices() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SIDE, SIDE, generator=generator) for _ in range(COUNT)]


def place(
    tmp_path: Path, written: Callable[[str], None] = lambda name: None, **options: Any
) -> Matrices:
    model, reader = Matrices(), FileReader()
    sources = in_file(matrices(), tmp_path / "model.safetensors", reader)
    recipes: dict[str, Any] = {f"w{n}": x * 2 - x.mean(0) for n, x in enumerate(sources)}
    try:
        Placer(
            model,
            lambda name: CPU,
            assign=True,
            maps=None,
            map_any_layout=False,
            progress=Progress(False),
            strides_of=lambda order, module, name, shape: strides_of_order(shape, range(2)),
            writing=written,
        ).place(recipes)
    finally:
        reader.close()
    return model


@pytest.fixture
def four_wide() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def in_the_loading_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class Reads:
    """Stands in for `FileSource.read_into`: counts, and does something first.

    Attributes:
        begun: how many reads have begun, in any thread.
        ahead: how many of them in another thread than the one that loads.
    """

    def __init__(self, patch: pytest.MonkeyPatch, first: Callable[[int], None]) -> None:
        self.begun = self.ahead = 0
        self._counted = threading.Condition()
        read_into = FileSource.read_into

        def counted(source: FileSource, *args: Any) -> None:
            is_ahead = not in_the_loading_thread()
            with self._counted:
                self.begun += 1
                self.ahead += is_ahead
                self._counted.notify_all()
            if is_ahead:
                first(self.ahead)
            read_into(source, *args)

        patch.setattr(FileSource, "read_into", counted)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        with self._counted:
            assert self._counted.wait_for(condition, timeout=60)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_reading_is_ahead_of_placing_where_storage_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch, lambda count: time.sleep(0.01))
    placed: list[str] = []

    def written(name: str) -> None:
        placed.append(name)
        if len(placed) < COUNT // 2:  # the last ones have no room for the next beside them
            reads.wait_until(lambda: reads.begun > len(placed))

    model = place(tmp_path, written)
    assert len(placed) == COUNT
    for number, x in enumerate(matrices()):
        assert_same(getattr(model, f"w{number}").detach(), x * 2 - x.mean(0))


@pytest.mark.parametrize("error", [CheckpointError("gone"), KeyboardInterrupt()])
def test_what_the_reading_thread_meets_ends_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(count: int) -> None:
        raise error

    reads, placed = Reads(monkeypatch, fail), []

    def written(name: str) -> None:
        placed.append(name)
        reads.wait_until(lambda: reads.ahead > 0)

    with pytest.raises(type(error)):
        place(tmp_path, written)
    assert len(placed) < COUNT


def test_a_load_that_fails_does_not_wait_for_a_slow_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    placed: list[str] = []
    dripping = threading.Event()
    read_at = reader_module._read_at

    def drips(descriptor: int, target: memoryview, offset: int) -> int:
        if in_the_loading_thread() or offset < 2 * SIDE * SIDE * 4:
            return read_at(descriptor, target, offset)
        calls.append(offset)
        dripping.set()
        time.sleep(0.001)
        return read_at(descriptor, target[:1], offset)

    monkeypatch.setattr(reader_module, "_read_at", drips)

    class StoppedError(Exception):
        pass

    def written(name: str) -> None:
        placed.append(name)
        if len(placed) == 2:  # the third is on its way
            assert dripping.wait(60)
            raise StoppedError

    with pytest.raises(StoppedError):
        place(tmp_path, written)
    assert 0 < len(calls) < SIDE * SIDE * 4


def test_the_reading_thread_is_one_wide_and_the_others_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, four_wide: None
) -> None:
    seen: list[int] = []

    def see(count: int) -> None:
        if not in_the_loading_thread():
            seen.append(torch.get_num_threads())

    reads = Reads(monkeypatch, see)
    place(tmp_path, lambda name: reads.wait_until(lambda: reads.ahead > 0))
    assert set(seen) == {1}
    assert torch.get_num_threads() == 4


def test_numbers_are_those_of_the_threads_that_the_caller_has(
    tmp_path: Path, four_wide: None
) -> None:
    model = place(tmp_path)
    for number, x in enumerate(matrices()):
        assert_same(getattr(model, f"w{number}").detach(), x * 2 - x.mean(0))


def test_without_another_thread_the_loading_one_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    model = place(tmp_path)
    for number, x in enumerate(matrices()):
        assert_same(getattr(model, f"w{number}").detach(), x * 2 - x.mean(0))


def fork_afterwards(folder: Path) -> None:
    """A load, and another one in a forked child."""
    place(folder)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            place(folder)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_fork_afterwards_loads_again(tmp_path: Path) -> None:
    # OpenMP's own threads do not survive a fork: with more than one, torch alone would hang.
    in_fork(lambda: fork_afterwards(tmp_path))
