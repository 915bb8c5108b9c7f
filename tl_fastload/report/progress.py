"""Progress of a load: a bar, a callback, or nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tl_fastload.errors import ArgumentError

ProgressCallback = Callable[["ProgressEvent"], None]
ProgressOption = None | bool | ProgressCallback


@dataclass(frozen=True)
class ProgressEvent:
    """Where a load or a save is.

    Attributes:
        done_bytes: parameter bytes in place, or written.
        total_bytes: parameter bytes of the whole model.
        name: the parameter that came last.
    """

    done_bytes: int
    total_bytes: int
    name: str


class Progress:
    """Reports bytes placed to whoever listens.

    Args:
        option: None for a bar when stderr is a terminal or in a notebook, True or False, or a
            callback.
        verb: what is done to the bytes.
    """

    def __init__(self, option: ProgressOption = None, verb: str = "loading") -> None:
        if not (option is None or isinstance(option, bool) or callable(option)):
            raise ArgumentError(f"progress={option!r} is none of None, True, False, a function.")
        self._callback = option if callable(option) else None
        self._wants_bar = _is_watched() if option is None else option is True
        self._verb = verb
        self._bar: Any = None
        self._task: Any = None
        self._done_bytes = 0
        self._total_bytes = 0

    def start(self, total_bytes: int) -> None:
        """Say how many bytes there will be."""
        self._total_bytes = total_bytes
        self._done_bytes = 0
        if self._wants_bar:
            self._bar = _new_bar()
            self._task = self._bar.add_task(self._verb, total=total_bytes)
            self._bar.start()

    def advance(self, name: str, size_bytes: int) -> None:
        """One more parameter is in place."""
        self._done_bytes += size_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done_bytes)
        if self._callback is not None:
            self._callback(ProgressEvent(self._done_bytes, self._total_bytes, name))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            # The work is done, whether its bar can still be drawn or not.
            with contextlib.suppress(OSError, ValueError):
                self._bar.stop()
            self._bar = None


def _is_watched() -> bool:
    if sys.stderr is not None and sys.stderr.isatty():
        return True
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def _new_bar() -> Any:
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        transient=console.is_terminal,
    )
