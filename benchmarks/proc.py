"""What Linux says about the memory of a process; `tl_fastload.cli.bench.worker` has it."""

from __future__ import annotations

from tl_fastload.cli.bench.worker import (
    Memory,
    StatusFile,
    meminfo,
    own_memory,
    release_free_heap,
    reset_peak_resident,
)

__all__ = [
    "Memory",
    "StatusFile",
    "meminfo",
    "own_memory",
    "release_free_heap",
    "reset_peak_resident",
]
