"""What the tests of measuring measure, in a fresh process and by name. Imports as little as it can:
every process pays for it.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MB = 10**6
Prepared = tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]


def describe_nothing(_: Any) -> dict[str, Any]:
    return {}


def allocate(kept_mb: int, briefly_mb: int = 0, seconds: float = 0.0) -> Prepared:
    """Holds memory of before the measurement, then takes some for a while and some for good."""
    before = bytearray(b"x") * (50 * MB)

    def act() -> list[bytearray]:
        held = [before]
        if briefly_mb:
            briefly = bytearray(b"x") * (briefly_mb * MB)
            del briefly
        held.append(bytearray(b"x") * (kept_mb * MB))
        time.sleep(seconds)
        return held

    return act, describe_nothing


def read_mapped(path: str) -> Prepared:
    def act() -> tuple[mmap.mmap, int]:
        with Path(path).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return mapped, sum(mapped[start] for start in range(0, len(mapped), mmap.PAGESIZE))

    return act, describe_nothing


def fail(message: str) -> Prepared:
    raise ValueError(message)


def report_threads() -> Prepared:
    import torch

    return torch.get_num_threads, lambda threads: {"threads": threads}
