"""The measured process: prepares, reports that it is ready, does one thing, says what it cost.

Speaks lines of JSON with `tl_fastload.cli.bench.process`, which samples its memory from outside
meanwhile. Runs as a file of its own and imports nothing but the standard library, so that a
measured process holds what it measures and nothing else.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_KIB = 1024
_RESET_PEAK_RESIDENT = "5"  # see proc(5), clear_refs


@dataclass(frozen=True)
class Memory:
    """One reading of `/proc/<pid>/status`."""

    anonymous_bytes: int
    file_bytes: int
    resident_bytes: int
    peak_resident_bytes: int


class StatusFile:
    """An open `/proc/<pid>/status`, cheap enough to read every two milliseconds."""

    def __init__(self, pid: int | str = "self") -> None:
        self._descriptor = os.open(f"/proc/{pid}/status", os.O_RDONLY)

    def read(self) -> Memory | None:
        """The present figures, or None when the process has ended."""
        try:
            text = os.pread(self._descriptor, 8192, 0)
        except ProcessLookupError:
            return None
        if b"RssAnon:" not in text:
            return None  # a zombie: its memory is gone
        return Memory(
            anonymous_bytes=_field(text, b"RssAnon:"),
            file_bytes=_field(text, b"RssFile:"),
            resident_bytes=_field(text, b"VmRSS:"),
            peak_resident_bytes=_field(text, b"VmHWM:"),
        )

    def close(self) -> None:
        os.close(self._descriptor)


def _field(text: bytes, name: bytes) -> int:
    start = text.index(name) + len(name)
    return int(text[start : text.index(b"kB", start)]) * _KIB


def own_memory() -> Memory:
    """The figures of this process."""
    status = StatusFile()
    try:
        memory = status.read()
    finally:
        status.close()
    if memory is None:
        raise RuntimeError("/proc/self/status has no RssAnon field; Linux 4.5 or newer is needed")
    return memory


def reset_peak_resident() -> bool:
    """Make `VmHWM` of this process start again from its present size; False when not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK_RESIDENT)
    except OSError:
        return False
    return True


def release_free_heap() -> None:
    """Give free heap back to the system, so that a later peak cannot hide in it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def meminfo(name: str) -> int:
    """One field of `/proc/meminfo` in bytes, such as "MemTotal" or "MemAvailable"."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * _KIB
    raise KeyError(name)


def main() -> None:
    # The libraries print to stdout; the conversation keeps the real one for itself.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    request = json.loads(sys.stdin.readline())
    sys.path[:] = request["path"]
    module, _, function = request["target"].partition(":")
    prepare = getattr(importlib.import_module(module), function)
    act, describe = prepare(**request["arguments"])
    gc.collect()
    release_free_heap()

    send(event="ready")
    sys.stdin.readline()
    baseline = own_memory()
    peak_is_exact = reset_peak_resident()
    start = time.perf_counter()
    result = act()
    seconds = time.perf_counter() - start
    end = own_memory()

    send(event="done")
    sys.stdin.readline()  # sampling has stopped: what follows is not part of the figures
    gc.collect()
    after = own_memory()
    facts = describe(result)  # which may use the result, and so bring in pages it had only mapped
    used = own_memory()
    send(
        event="result",
        seconds=seconds,
        baseline=asdict(baseline),
        end=asdict(end),
        after=asdict(after),
        peak_is_exact=peak_is_exact,
        used=asdict(used),
        facts=facts,
    )


if __name__ == "__main__":
    main()
