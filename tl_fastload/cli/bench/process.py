"""Measure one action in a fresh process: its time, and its memory as seen from outside.

The measured process (`tl_fastload.cli.bench.worker`) imports and prepares first. Then a thread of
*this* process reads its `/proc/<pid>/status` every two milliseconds, so that sampling never takes
the interpreter lock of what it measures. Figures are above what the process held when the action
began. A spike between two samples is seen only in part: no more is missed than the system can
hand out in two milliseconds (some 10 MB); `peak_resident_bytes` comes from the kernel's own high
water mark where that can be reset, and misses nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from tl_fastload.cli.bench import worker
from tl_fastload.cli.bench.worker import Memory, StatusFile
from tl_fastload.report.timeline import Phase, Recorder, Timeline

_SAMPLE_SECONDS = 0.002
_READ_AHEAD_BYTES = 16 << 20
_PROJECT = Path(__file__).resolve().parents[3]
# The user's settings for these would decide the outcome; unset, every core is used.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Measurement:
    """What an action cost; memory in bytes above the start of the action.

    Attributes:
        seconds: one entry per repeat.
        peak_anonymous_bytes: highest private memory seen (largest of the repeats, as all peaks).
        peak_resident_bytes: highest resident memory, file pages included.
        peak_file_bytes: highest resident file pages.
        after_anonymous_bytes: private memory when the action was done and garbage collected.
        used_resident_bytes: resident memory after the result was also described, which for a
            model with `forward_tokens` means run: pages that were only mapped are there now.
        facts: what the action said of its result, such as "parameter_bytes".
        timeline: memory over time, if it was asked for.
        error: why there are no figures, or None.
    """

    name: str
    seconds: tuple[float, ...] = ()
    peak_anonymous_bytes: int = 0
    peak_resident_bytes: int = 0
    peak_file_bytes: int = 0
    after_anonymous_bytes: int = 0
    used_resident_bytes: int = 0
    samples: int = 0
    peak_is_exact: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    timeline: Timeline | None = None

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the loaded parameters, each storage counted once."""
        return int(self.facts["parameter_bytes"])


class _Sampler:
    """Reads a process' memory in a thread until it is told to stop."""

    def __init__(self, pid: int) -> None:
        self.samples: list[tuple[float, Memory]] = []
        self._status = StatusFile(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            memory = self._status.read()
            if memory is None:
                return
            self.samples.append((time.perf_counter(), memory))
            if self._stop.wait(_SAMPLE_SECONDS):
                return

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._status.close()


class WorkerError(RuntimeError):
    """The measured process failed; the message is the last line it wrote."""


def run_action(
    target: str,
    arguments: Mapping[str, Any],
    name: str = "",
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 1800,
    with_timeline: bool = False,
) -> Measurement:
    """Measure one action in a fresh process, which imports from where this one does.

    Args:
        target: "module:function". Called with `arguments` in the new process, unmeasured, the
            function returns `(act, describe)`: `act()` is measured, `describe(result)` says
            afterwards what is worth knowing of its result, as JSON.
        arguments: JSON, for the function.
        name: of the measurement.
        environment: variables to set.
        timeout_seconds: after which the process is ended.
        with_timeline: keep memory over time, too; `facts["phases"]` gives its phases.

    Raises:
        WorkerError: the process failed or took too long.
    """
    request = {"target": target, "arguments": dict(arguments), "path": sys.path}
    with _worker(environment or {}, timeout_seconds) as (process, receive):
        _tell(process, request)
        receive("ready")
        sampler = _Sampler(process.pid)
        started = time.perf_counter()
        try:
            _tell(process, "go")
            receive("done")
        finally:
            sampler.stop()
        _tell(process, "stopped")
        result = receive("result")
    found = _measurement(name, result, [memory for _, memory in sampler.samples])
    if not with_timeline:
        return found
    return replace(found, timeline=_timeline(result, sampler.samples, started))


@contextmanager
def _worker(environment: Mapping[str, str], timeout_seconds: float) -> Iterator[tuple[Any, Any]]:
    variables = {k: v for k, v in os.environ.items() if k not in _THREAD_VARIABLES}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-I", worker.__file__],
            env={**variables, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        alarm = threading.Timer(timeout_seconds, process.kill)
        alarm.start()

        def receive(event: str) -> dict[str, Any]:
            assert process.stdout is not None
            line = process.stdout.readline()
            message: dict[str, Any] = json.loads(line) if line else {}
            if message.get("event") != event:
                raise WorkerError(_last_words(process.wait(), errors))
            return message

        try:
            yield process, receive
        finally:
            alarm.cancel()
            process.kill()
            process.communicate()


def _tell(process: subprocess.Popen[str], message: Any) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has died: the next `receive` says why


def _last_words(status: int, errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no message"
    # What is kept of a run must not say where on whose machine it ran.
    for place in (_PROJECT, Path.home()):
        last = last.replace(f"{place}/", "")
    return f"{last} (exit status {status})"


def _measurement(name: str, result: dict[str, Any], samples: Sequence[Memory]) -> Measurement:
    baseline, end = Memory(**result["baseline"]), Memory(**result["end"])
    seen = [*samples, end]
    resident = max(memory.resident_bytes for memory in seen)
    if result["peak_is_exact"]:
        resident = max(resident, end.peak_resident_bytes)
    return Measurement(
        name=name,
        seconds=(result["seconds"],),
        peak_anonymous_bytes=max(m.anonymous_bytes for m in seen) - baseline.anonymous_bytes,
        peak_resident_bytes=resident - baseline.resident_bytes,
        peak_file_bytes=max(m.file_bytes for m in seen) - baseline.file_bytes,
        after_anonymous_bytes=result["after"]["anonymous_bytes"] - baseline.anonymous_bytes,
        used_resident_bytes=result["used"]["resident_bytes"] - baseline.resident_bytes,
        samples=len(samples),
        peak_is_exact=result["peak_is_exact"],
        facts=result["facts"],
    )


def _timeline(
    result: dict[str, Any], samples: Sequence[tuple[float, Memory]], started: float
) -> Timeline:
    baseline, recorder = Memory(**result["baseline"]), Recorder()
    recorder.add(0.0, 0, 0)
    moments = [(moment - started, memory) for moment, memory in samples if moment >= started]
    for seconds, memory in [*moments, (result["seconds"], Memory(**result["end"]))]:
        recorder.add(
            min(seconds, result["seconds"]),
            memory.resident_bytes - baseline.resident_bytes,
            memory.anonymous_bytes - baseline.anonymous_bytes,
        )
    return recorder.timeline([Phase(**phase) for phase in result["facts"].get("phases", ())])


def combine(repeats: Sequence[Measurement]) -> Measurement:
    """One measurement out of several of the same case: every time, the largest of each memory."""
    good = [m for m in repeats if m.error is None]
    if len(good) < len(repeats):
        return next(m for m in repeats if m.error is not None)
    return replace(
        good[0],
        seconds=tuple(s for m in good for s in m.seconds),
        peak_anonymous_bytes=max(m.peak_anonymous_bytes for m in good),
        peak_resident_bytes=max(m.peak_resident_bytes for m in good),
        peak_file_bytes=max(m.peak_file_bytes for m in good),
        after_anonymous_bytes=max(m.after_anonymous_bytes for m in good),
        used_resident_bytes=max(m.used_resident_bytes for m in good),
        samples=min(m.samples for m in good),
        peak_is_exact=all(m.peak_is_exact for m in good),
        facts=_combined_facts([m.facts for m in good]),
        timeline=max(good, key=lambda m: m.peak_anonymous_bytes).timeline,
    )


def _combined_facts(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The facts of the first repeat, with the median of the forward times of all."""
    if "forward_seconds" not in facts[0]:
        return facts[0]
    lengths = facts[0]["forward_seconds"]
    medians = {n: statistics.median(f["forward_seconds"][n] for f in facts) for n in lengths}
    return {**facts[0], "forward_seconds": medians}


def read_ahead(path: Path) -> None:
    """Bring a file into the page cache, so that every load of it is a warm one."""
    with path.open("rb", buffering=0) as file:
        while file.read(_READ_AHEAD_BYTES):
            pass
