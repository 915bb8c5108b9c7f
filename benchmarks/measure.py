"""Measure one action in a fresh process: its time, and its memory as seen from outside.

The measured process (`benchmarks.worker`) imports and prepares first. Then a thread of *this*
process reads its `/proc/<pid>/status` every two milliseconds, so that sampling never takes the
interpreter lock of what it measures. Figures are above what the process held when the action
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from benchmarks import models
from benchmarks.proc import Memory, StatusFile, meminfo

_SAMPLE_SECONDS = 0.002
_READ_AHEAD_BYTES = 16 << 20
_IMPORTS_BYTES = 1 << 30
_PROJECT = Path(__file__).resolve().parents[1]
# The user's settings for these would decide the outcome; unset, every core is used.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Case:
    """One load to measure.

    Attributes:
        model: a key of `benchmarks.models.SHAPES`.
        road: who loads: a key of `benchmarks.roads.ROADS` ("lean", "stock", "transformers",
            "floor").
        dtype: of the loaded parameters, a torch name such as "float32".
        processed: whether TransformerLens' processing (folding, centring) is on.
        strategy: passed to the lean loader.
        from_hf_model: the caller holds the Hugging Face model in memory and passes it.
        adapter: a LoRA adapter is merged too: by the lean loader, or by peft before stock.
        loads: how many times to load, each time letting the one before go.
        forward_tokens: lengths of the batch-1 forward passes to time after the load.
    """

    model: str
    road: str
    dtype: str
    processed: bool = True
    strategy: str = "auto"
    from_hf_model: bool = False
    adapter: bool = False
    loads: int = 1
    forward_tokens: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Short and unique, such as "llama-1.1b bfloat16 lean processed"."""
        parts = [self.model, self.dtype, self.road]
        if self.road in ("lean", "stock"):
            parts.append("processed" if self.processed else "unprocessed")
        if self.strategy != "auto":
            parts.append(self.strategy)
        if self.from_hf_model:
            parts.append("hf_model")
        if self.adapter:
            parts.append("adapter")
        if self.loads > 1:
            parts.append(f"x{self.loads}")
        return " ".join(parts)


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
        self.samples: list[Memory] = []
        self._status = StatusFile(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            memory = self._status.read()
            if memory is None:
                return
            self.samples.append(memory)
            if self._stop.wait(_SAMPLE_SECONDS):
                return

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._status.close()


class WorkerError(RuntimeError):
    """The measured process failed; the message is the last line it wrote."""


def run_case(case: Case, cache: Path | None = None, timeout_seconds: float = 1800) -> Measurement:
    """Measure one load in a fresh process, its checkpoint made and read into the page cache first.

    Args:
        case: what to load, and how.
        cache: folder of the benchmark checkpoints; default `models.default_cache()`.
        timeout_seconds: after which the process is ended and the case has failed.

    Returns:
        The measurement. When the process failed, or would not fit in memory, `error` says so.
    """
    folder = models.make_checkpoint(case.model, cache).resolve()
    need, free = needed_bytes(case), meminfo("MemAvailable")
    if need > free:
        return Measurement(
            case.name, error=f"not measured: needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
        )
    _read_ahead(models.weights_file(folder))
    environment = {"HF_HOME": str(models.hub_home(folder)), "HF_HUB_OFFLINE": "1"}
    arguments = {"case": asdict(case), "folder": str(folder)}
    try:
        return run_action(
            "benchmarks.roads:prepare", arguments, case.name, environment, timeout_seconds
        )
    except WorkerError as error:
        return Measurement(case.name, error=f"failed: {error}")


def run_action(
    target: str,
    arguments: Mapping[str, Any],
    name: str = "",
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 1800,
) -> Measurement:
    """Measure one action in a fresh process.

    Args:
        target: "module:function". Called with `arguments` in the new process, unmeasured, the
            function returns `(act, describe)`: `act()` is measured, `describe(result)` says
            afterwards what is worth knowing of its result, as JSON.
        arguments: JSON, for the function.
        name: of the measurement.
        environment: variables to set.
        timeout_seconds: after which the process is ended.

    Raises:
        WorkerError: the process failed or took too long.
    """
    request = {"target": target, "arguments": dict(arguments)}
    with _worker(environment or {}, timeout_seconds) as (process, receive):
        _tell(process, request)
        receive("ready")
        sampler = _Sampler(process.pid)
        try:
            _tell(process, "go")
            receive("done")
        finally:
            sampler.stop()
        _tell(process, "stopped")
        return _measurement(name, receive("result"), sampler.samples)


@contextmanager
def _worker(environment: Mapping[str, str], timeout_seconds: float) -> Iterator[tuple[Any, Any]]:
    variables = {k: v for k, v in os.environ.items() if k not in _THREAD_VARIABLES}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=_PROJECT,
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
    )


def _combined_facts(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The facts of the first repeat, with the median of the forward times of all."""
    lengths = facts[0].get("forward_seconds", {})
    medians = {n: statistics.median(f["forward_seconds"][n] for f in facts) for n in lengths}
    return {**facts[0], "forward_seconds": medians}


def needed_bytes(case: Case) -> int:
    """Memory that must be free for the case to be run, on the safe side."""
    shape = models.SHAPES[case.model]
    file_bytes = models.file_bytes(shape)
    elements = file_bytes // models.item_bytes(shape.file_dtype)
    if case.road == "stock":  # its processing upcasts everything, whatever the dtype
        return _IMPORTS_BYTES + elements * models.item_bytes("float32") * 7 // 2
    held_by_caller = file_bytes if case.from_hf_model else 0
    return _IMPORTS_BYTES + held_by_caller + elements * models.item_bytes(case.dtype) * 3 // 2


def _read_ahead(path: Path) -> None:
    """Bring a file into the page cache: every load is a warm one."""
    with path.open("rb", buffering=0) as file:
        while file.read(_READ_AHEAD_BYTES):
            pass
