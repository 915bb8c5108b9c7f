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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeVar

from tl_fastload.cli.bench import worker
from tl_fastload.ground.words import format_bytes
from tl_fastload.report.available import available_host_bytes
from tl_fastload.report.memory import PeakSampler
from tl_fastload.report.timeline import Phase, Timeline

_SAMPLE_SECONDS = 0.002
_READ_AHEAD_BYTES = 16 << 20
_PROJECT = Path(__file__).resolve().parents[3]
# The user's settings for these would decide the outcome; unset, every core is used.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_LARGEST = (
    *("peak_anonymous_bytes", "peak_resident_bytes", "peak_file_bytes"),
    *("after_anonymous_bytes", "used_resident_bytes"),
)
"""Figures of which the largest of the repeats counts."""
Subject = TypeVar("Subject")


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


def measure(
    target: str,
    arguments: Mapping[str, Any],
    name: str = "",
    environment: Mapping[str, str] | None = None,
    needed_bytes: int = 0,
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
        needed_bytes: memory that must be free.
        timeout_seconds: after which the process is ended.
        with_timeline: keep memory over time, too; `facts["phases"]` gives its phases.

    Returns:
        The measurement; its `error` says so if the process would not fit, failed or took too long.
    """
    free = available_host_bytes()
    if needed_bytes > free:
        need = f"needs {format_bytes(needed_bytes)}, {format_bytes(free)} are free"
        return Measurement(name, error=f"not measured: {need}")
    request = {"target": target, "arguments": dict(arguments), "path": sys.path}
    try:
        with _worker(environment or {}, timeout_seconds) as (process, ask):
            ask(request)
            peak_is_exact = _reset_peak_resident(process)
            with PeakSampler(process=process, every_seconds=_SAMPLE_SECONDS) as sampler:
                seconds = ask("go")["seconds"]
            ask("collect garbage")
            after = sampler.growth()
            facts = ask("describe")["facts"]
            used = sampler.growth()
    except ChildProcessError as error:
        return Measurement(name, error=f"failed: {error}")
    timeline = sampler.timeline()
    phases = tuple(Phase(**phase) for phase in facts.get("phases", ()))
    return Measurement(
        name=name,
        seconds=(seconds,),
        peak_anonymous_bytes=sampler.peak.anonymous_bytes,
        peak_resident_bytes=max(sampler.peak.resident_bytes, sampler.peak.highest_bytes),
        peak_file_bytes=sampler.peak.file_bytes,
        after_anonymous_bytes=after.anonymous_bytes,
        used_resident_bytes=used.resident_bytes,
        samples=sampler.samples,
        peak_is_exact=peak_is_exact,
        facts=facts,
        timeline=replace(timeline, phases=phases) if with_timeline else None,
    )


def measure_in_turns(
    rounds: Sequence[Subject], measure_one: Callable[[int, Subject], Measurement]
) -> dict[Subject, Measurement]:
    """Measure one after the other, and combine what was measured several times.

    Args:
        rounds: what to measure; what is measured several times is named as often, in turns, so
            that a machine that gets slower meanwhile changes all alike.
        measure_one: told the number of the turn, from 1 on, and what to measure in it. Not asked
            again of what has failed or did not fit.
    """
    found: dict[Subject, list[Measurement]] = {}
    for number, one in enumerate(rounds, start=1):
        earlier = found.setdefault(one, [])
        if not earlier or earlier[-1].error is None:
            earlier.append(measure_one(number, one))
    return {one: combine(repeats) for one, repeats in found.items()}


@contextmanager
def _worker(
    environment: Mapping[str, str], timeout_seconds: float
) -> Iterator[tuple[int, Callable[[Any], dict[str, Any]]]]:
    """A fresh process: its number, and a function that tells it something and waits for the
    answer, or raises ChildProcessError with its last words.
    """
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
        assert process.stdin is not None
        assert process.stdout is not None
        told, answers = process.stdin, process.stdout

        def ask(what: Any) -> dict[str, Any]:
            with suppress(BrokenPipeError):  # it has died, and does not answer
                told.write(json.dumps(what) + "\n")
                told.flush()
            line = answers.readline()
            if not line:
                raise ChildProcessError(_last_words(process.wait(), errors))
            answer: dict[str, Any] = json.loads(line)
            return answer

        alarm = threading.Timer(timeout_seconds, process.kill)
        alarm.start()
        try:
            yield process.pid, ask
        finally:
            alarm.cancel()
            process.kill()
            process.communicate()


def _reset_peak_resident(process: int) -> bool:
    """Make the kernel's mark of a process start again from its present size; False when it may
    not.
    """
    try:
        Path(f"/proc/{process}/clear_refs").write_text("5")  # see proc(5)
    except OSError:
        return False
    return True


def _last_words(status: int, errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no message"
    # What is kept of a run must not say where on whose machine it ran.
    for place in (_PROJECT, Path.home()):
        last = last.replace(f"{place}/", "")
    return f"{last} (exit status {status})"


def combine(repeats: Sequence[Measurement]) -> Measurement:
    """One measurement out of several of the same case: every time, the largest of each memory."""
    good = [m for m in repeats if m.error is None]
    if len(good) < len(repeats):
        return next(m for m in repeats if m.error is not None)
    largest = {name: max(getattr(m, name) for m in good) for name in _LARGEST}
    return replace(
        good[0],
        **largest,
        seconds=tuple(s for m in good for s in m.seconds),
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
