"""Looking at this process's memory."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tl_fastload.report import memory
from tl_fastload.report.memory import PeakSampler, host_memory, unique_bytes

MIB = 1 << 20


def test_resident_memory_includes_anonymous_memory() -> None:
    now = host_memory()
    assert 0 < now.anonymous_bytes <= now.resident_bytes
    assert now.resident_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)


def test_without_proc_all_counts_as_anonymous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "Path", lambda name: Path("/nowhere") / name.lstrip("/"))
    now = host_memory()
    assert now.anonymous_bytes == now.resident_bytes > 0


def test_a_peak_that_has_passed_is_seen() -> None:
    with PeakSampler() as sampler:
        block = torch.ones(64 * MIB, dtype=torch.uint8)
        sampler.look()
        del block
        gc.collect()
    assert sampler.peak_anonymous_bytes > 60 * MIB
    assert sampler.peak_host_bytes > 60 * MIB
    assert sampler.peak_device_bytes is None or not torch.cuda.is_available()


def test_the_thread_samples_by_itself_and_ends() -> None:
    gc.collect()  # garbage that goes while the block is there would hide it
    with PeakSampler() as sampler:
        block = torch.ones(64 * MIB, dtype=torch.uint8)
        give_up = time.monotonic() + 300
        while sampler.peak_anonymous_bytes < 60 * MIB and time.monotonic() < give_up:
            time.sleep(memory.SAMPLE_SECONDS)
        del block
    assert sampler.peak_anonymous_bytes > 60 * MIB
    assert not sampler._thread.is_alive()


def test_another_process_is_watched_until_it_ends() -> None:
    code = "held = bytearray(b'x') * (64 << 20); print(flush=True); input()"
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert host_memory(process.pid).anonymous_bytes > 60 * MIB
        with PeakSampler(process=process.pid) as sampler:
            process.kill()
            process.wait()
            sampler.look()  # finds nothing, and says nothing
    assert sampler.peak_host_bytes < MIB


def test_the_thread_ends_after_an_error() -> None:
    sampler = PeakSampler()
    with pytest.raises(KeyError), sampler:
        raise KeyError
    assert not sampler._thread.is_alive()


def test_shared_elements_count_once() -> None:
    x = torch.zeros(10, 10)
    assert unique_bytes([x, x.view(10, 10), torch.zeros(3)]) == 412
    assert unique_bytes([x[:5], x[5:]]) == 400
    y = torch.zeros(4, 6)
    assert unique_bytes([y.T[:2], y, y[:, 2:4]]) == 96  # views into one of them
    assert unique_bytes([]) == 0
