"""Memory over the time of a load, and which phase each moment belongs to."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, TypeVar

MOST_POINTS = 512
_LOOK_SECONDS = 0.02

# Functions of TransformerLens -> what a stock load does inside of them.
_STOCK_PHASES = {
    "get_pretrained_model_config": "configuration",
    "get_pretrained_state_dict": "transformers loads",
    "load_and_process_state_dict": "processing",
}


@dataclass(frozen=True)
class Phase:
    """A part of a load: from `start_seconds` until the next one."""

    name: str
    start_seconds: float


@dataclass(frozen=True)
class Timeline:
    """Memory of a process over the time of a load, in bytes above its start.

    Attributes:
        seconds: when each point was taken, since the start; at most some 500 points, each the
            highest of the moments that it stands for.
        resident_bytes: resident memory, file pages included.
        anonymous_bytes: the part of it that is no page of a file.
        device_bytes: CUDA memory allocated by torch; empty without CUDA.
        phases: in the order of time.
    """

    seconds: tuple[float, ...] = ()
    resident_bytes: tuple[int, ...] = ()
    anonymous_bytes: tuple[int, ...] = ()
    device_bytes: tuple[int, ...] = ()
    phases: tuple[Phase, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Recorder:
    """Collects the points of a `Timeline`; memory stays bounded however long the load takes."""

    def __init__(self) -> None:
        self._points: list[tuple[float, Sequence[int]]] = []
        self._last: tuple[float, Sequence[int]] | None = None
        self._moments_a_point = 1
        self._moments = 0

    def add(self, seconds: float, *sizes_bytes: int) -> None:
        """One more moment: resident, anonymous and, with CUDA, device bytes."""
        self._last = (seconds, sizes_bytes)
        if self._moments % self._moments_a_point:
            self._points[-1] = _highest(self._points[-1], self._last)
        else:
            self._points.append(self._last)
        self._moments += 1
        if len(self._points) == MOST_POINTS and self._moments % self._moments_a_point == 0:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [_highest(one, other) for one, other in pairs]
            self._moments_a_point *= 2

    def timeline(self, phases: Sequence[Phase] = ()) -> Timeline:
        """What was seen so far; the last moment is a point of its own."""
        points = list(self._points)
        if self._last is not None and points[-1] != self._last:
            points.append(self._last)
        series = [tuple(sizes) for sizes in zip(*(sizes for _, sizes in points), strict=True)]
        resident, anonymous, device = (*series, (), (), ())[:3]
        seconds = tuple(seconds for seconds, _ in points)
        return Timeline(seconds, resident, anonymous, device, tuple(phases))


def _highest(
    one: tuple[float, Sequence[int]], other: tuple[float, Sequence[int]]
) -> tuple[float, Sequence[int]]:
    return one[0], tuple(map(max, one[1], other[1]))


Watching = TypeVar("Watching", bound="PhaseWatch")


class PhaseWatch:
    """Tells the phases of a load for as long as a `with` lasts: those that are marked, and those of
    a stock load, which marks none, by looking at the stack of the thread that made this.

    Attributes:
        phases: those marked so far.

    Args:
        every_seconds: how long to wait between looks.
    """

    def __init__(self, every_seconds: float = _LOOK_SECONDS) -> None:
        self.phases: list[Phase] = []
        self._every_seconds = every_seconds
        self._watched_thread = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tl_fastload-watch", daemon=True)

    def __enter__(self: Watching) -> Watching:
        self._start_seconds = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> None:
        """Look once, now."""
        phase = _phase_of(sys._current_frames().get(self._watched_thread))
        if phase is not None:
            self.mark(phase)

    def mark(self, phase: str) -> None:
        """A phase begins, or goes on."""
        if not self.phases or self.phases[-1].name != phase:
            self.phases.append(Phase(phase, self.seconds()))

    def seconds(self) -> float:
        """Since the watching began."""
        return time.perf_counter() - self._start_seconds

    def _run(self) -> None:
        while not self._stop.wait(self._every_seconds):
            self.look()


def _phase_of(frame: FrameType | None) -> str | None:
    """The phase of the innermost frame that tells one."""
    while frame is not None:
        name = frame.f_code.co_name
        if name in _STOCK_PHASES:
            return _STOCK_PHASES[name]
        if name.startswith("convert_") and name.endswith("_weights"):
            return "conversion"
        frame = frame.f_back
    return None
