"""Reads weights in a thread of its own, before the thread that evaluates needs them.

Only reading, and casts on the way, happen there: their bits depend on no number of threads. All
that is computed stays in the thread that loads, with the threads that it has.
"""

from __future__ import annotations

import ctypes
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import torch

from tl_fastload.recipes.evaluate import Evaluation, Value
from tl_fastload.recipes.nodes import Source, SourceView
from tl_fastload.recipes.spares import LEAST_BYTES, Spares

_LOOK_SECONDS = 0.5  # so that an interrupt is never stuck in a wait, whatever the system


class ReadingAhead:
    """A thread that reads for evaluations that are not begun yet; none is left behind.

    Args:
        spares: where new memory is put ahead of time.
    """

    def __init__(self, spares: Spares) -> None:
        self._spares = spares
        self._thread = ThreadPoolExecutor(1, "tl_fastload-read", _be_one_thread_wide)
        self._sources: dict[Source, None] = {}
        self._evaluations: list[Evaluation] = []

    def __enter__(self) -> ReadingAhead:
        return self

    def __exit__(self, kind: Any, *raised: object) -> None:
        if kind is not None:
            for source in self._sources:
                source.stop()
            for evaluation in self._evaluations:
                evaluation.ahead.clear()  # the traceback holds them as long as the error lives
        self._thread.shutdown(wait=True, cancel_futures=True)

    def begin(self, evaluation: Evaluation, most_bytes: int, new_bytes: list[int]) -> None:
        """Read what an evaluation needs first.

        Args:
            evaluation: waits for what is on its way when it needs it.
            most_bytes: of values that are held at a time before they are needed.
            new_bytes: sizes of the memory that will stay with the evaluation's results.
        """
        self._evaluations = [*self._evaluations[-1:], evaluation]  # and the one that is in work
        for view in evaluation.reads():
            size = view.geometry.numel() * torch.empty(0, dtype=view.dtype).element_size()
            if not view.source.reads_ahead or size < LEAST_BYTES:
                continue
            most_bytes -= size
            if most_bytes < 0:
                break
            self._read(evaluation, view)
        for size in new_bytes:
            self._submit(self._spares.stock, size)

    def _read(self, evaluation: Evaluation, view: SourceView) -> None:
        self._sources[view.source] = None
        future = self._submit(evaluation.read, view)
        if future is not None:
            evaluation.ahead[view] = partial(_value_of, future, evaluation, view)

    def _submit(self, function: Any, *args: Any) -> Future[Any] | None:
        try:
            return self._thread.submit(function, *args)
        except RuntimeError:  # no thread can be started any more: nothing is read ahead
            return None


def _value_of(future: Future[Value], evaluation: Evaluation, view: SourceView) -> Value:
    """What was read; read here if the thread has not begun to."""
    if future.cancel():
        return evaluation.read(view)
    while not wait([future], timeout=_LOOK_SECONDS).done:
        pass
    return future.result()


def _be_one_thread_wide() -> None:
    """Leave the other cores to the thread that computes: OpenMP's width belongs to a thread."""
    torch.get_num_threads()  # torch sets that of a new thread when it is asked first
    if sys.platform.startswith("linux"):
        set_width = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
        if set_width is not None:
            set_width(1)
