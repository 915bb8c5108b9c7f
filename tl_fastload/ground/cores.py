"""Shares the cores between the thread that loads and those that work ahead for it.

OpenMP's threads wait for one another by spinning: an operation in more of them than there are free
cores takes several times as long, and each leaves them spinning for milliseconds afterwards. How
many are used belongs to the thread that asks for them: no other thread sees what is set here.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, local
from typing import Any

import torch

_PAUSE_SECONDS = 0.5  # so that no thread waits for ever, whatever happens to the other one
# A PyDLL keeps the interpreter's lock, which another thread would take for long.
_OPENMP: Any = ctypes.PyDLL(None) if sys.platform.startswith("linux") else None


class Cores:
    """The cores that one load may use.

    Attributes:
        helpers: threads that work ahead, each one core wide.
    """

    def __init__(self) -> None:
        self.helpers = 0
        self._free = Event()
        self._free.set()

    @contextmanager
    def beside_helpers(self) -> Iterator[None]:
        """Compute with the cores that helpers leave: for what gives the same bits in any number of
        threads.
        """
        width = torch.get_num_threads()
        left = max(1, width - self.helpers)
        if left == width:
            yield
            return
        before = _set_width(left)
        try:
            yield
        finally:
            if before is not None:
                _set_width(before)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Compute with all threads that the caller has, while helpers pause."""
        if not self.helpers or torch.get_num_threads() == 1:
            yield
            return
        self._free.clear()
        try:
            yield
        finally:
            self._free.set()

    def help(self) -> None:
        """Make the calling thread a helper."""
        torch.get_num_threads()  # torch sets that of a new thread when it is asked first
        _set_width(1)
        _own.free = self._free


_own = local()


def pause() -> None:
    """Wait in a helper until the cores are free again; elsewhere do nothing. Called by whatever
    takes long, every millisecond or so.
    """
    free: Event | None = getattr(_own, "free", None)
    if free is not None and not free.is_set():
        free.wait(_PAUSE_SECONDS)


def _set_width(threads: int) -> int | None:
    """Set how many threads OpenMP takes for the calling one; returns how many it took, or None
    where that cannot be set.
    """
    if not hasattr(_OPENMP, "omp_set_num_threads"):
        return None
    before = int(_OPENMP.omp_get_max_threads())
    _OPENMP.omp_set_num_threads(threads)
    return before
