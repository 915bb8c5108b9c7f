"""Memory over time: bounded, never below what was seen, with its phases."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

import tl_fastload
from tests.support.comparison import lean_model
from tl_fastload.report.timeline import MOST_POINTS, Phase, PhaseWatch, Recorder


def until(happens: Callable[[], bool]) -> None:
    """Wait for a thread that watches, however seldom it runs."""
    give_up = time.monotonic() + 300
    while not happens() and time.monotonic() < give_up:
        time.sleep(0.002)


@pytest.mark.parametrize("moments", [1, 2, 7, MOST_POINTS, MOST_POINTS + 1, 20_000])
def test_points_are_bounded_and_keep_every_peak(moments: int) -> None:
    recorder = Recorder()
    sizes = [(i * 7919) % 1000 for i in range(moments)]
    for i, size in enumerate(sizes):
        recorder.add(i * 0.5, size, size // 2)
    found = recorder.timeline()
    assert len(found.seconds) <= MOST_POINTS + 1
    assert list(found.seconds) == sorted(found.seconds)
    assert max(found.resident_bytes) == max(sizes)
    assert max(found.anonymous_bytes) == max(sizes) // 2
    assert found.seconds[0] == 0
    assert (found.seconds[-1], found.resident_bytes[-1]) == ((moments - 1) * 0.5, sizes[-1])
    assert len(found.resident_bytes) == len(found.anonymous_bytes) == len(found.seconds)
    assert found.device_bytes == ()


def test_device_memory_is_a_third_series() -> None:
    recorder = Recorder()
    recorder.add(0.0, 1, 2, 3)
    recorder.add(1.0, 4, 5, 6)
    found = recorder.timeline([Phase("placing", 0.5)])
    assert found.device_bytes == (3, 6)
    assert found.to_dict()["phases"] == ({"name": "placing", "start_seconds": 0.5},)


def test_nothing_seen_is_an_empty_timeline() -> None:
    assert Recorder().timeline().seconds == ()


def test_a_lean_load_marks_its_phases(zoo: Any) -> None:
    report = lean_model(zoo("llama-gqa")).load_report
    names = [phase.name for phase in report.timeline.phases]
    assert names == ["configuration", "recording", "placing"]
    starts = [phase.start_seconds for phase in report.timeline.phases]
    assert starts == sorted(starts)
    assert starts[-1] < report.timeline.seconds[-1] <= report.seconds
    assert max(report.timeline.anonymous_bytes) == report.peak_anonymous_bytes


def test_phases_of_a_stock_load_are_read_from_the_stack() -> None:
    def get_pretrained_state_dict() -> None:
        until(lambda: len(seen.phases) > 0)
        convert_llama_weights()

    def convert_llama_weights() -> None:
        until(lambda: len(seen.phases) > 1)

    def load_and_process_state_dict() -> None:
        until(lambda: len(seen.phases) > 2)

    with PhaseWatch() as seen:
        get_pretrained_state_dict()
        load_and_process_state_dict()
    names = [phase.name for phase in seen.phases]
    assert names == ["transformers loads", "conversion", "processing"]
    assert 0 < seen.phases[1].start_seconds < seen.phases[2].start_seconds


def test_watching_a_stock_load_sees_its_memory() -> None:
    with tl_fastload.watch_memory() as watched:
        held = bytearray(b"x") * (64 << 20)
        until(lambda: watched.peak_anonymous_bytes > 60 << 20)
    del held
    assert max(watched.timeline().anonymous_bytes) == watched.peak_anonymous_bytes
    assert watched.peak_anonymous_bytes > 60 << 20
