"""Works in threads of its own for the thread that evaluates: one reads weights before they are
needed, another has the system put pages behind new memory, which takes as long.

Only reading, and casts on the way, happen there: their bits depend on no number of threads. All
that is computed stays in the thread that loads.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from tl_fastload.ground.compat import item_bytes
from tl_fastload.ground.cores import Cores
from tl_fastload.recipes.evaluate import Evaluation, Value
from tl_fastload.recipes.nodes import Node, Source, dtype_of, shape_of
from tl_fastload.recipes.spares import LEAST_BYTES, Spares

_LOOK_SECONDS = 0.5  # so that an interrupt is never stuck in a wait, whatever the system


class ReadingAhead:
    """Threads that read for evaluations that are not begun yet; none is left behind.

    Args:
        spares: where new memory is put ahead of time.
        cores: shared with the thread that evaluates.
    """

    def __init__(self, spares: Spares, cores: Cores) -> None:
        self._spares = spares
        self._cores = cores
        self._reading = ThreadPoolExecutor(1, "tl_fastload-read", cores.help)
        self._stocking = ThreadPoolExecutor(1, "tl_fastload-stock", cores.help)
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
        for waits in (False, True):  # both end what they are in at the same time
            self._reading.shutdown(waits, cancel_futures=True)
            self._stocking.shutdown(waits, cancel_futures=True)
        self._cores.helpers = 0

    def begin(self, evaluation: Evaluation, most_bytes: int, new_bytes: list[int]) -> None:
        """Read what an evaluation needs first.

        Args:
            evaluation: waits for what is on its way when it needs it.
            most_bytes: of values that are held at a time before they are needed.
            new_bytes: sizes of the memory that will stay with the evaluation's results.
        """
        self._evaluations = [*self._evaluations[-1:], evaluation]  # and the one that is in work
        for node, view in evaluation.reads().items():
            size = shape_of(node).numel() * item_bytes(dtype_of(node))
            if not view.source.reads_ahead or size < LEAST_BYTES:
                continue
            most_bytes -= size
            if most_bytes < 0:
                break
            self._read(evaluation, node, view.source)
        for size in new_bytes:
            if size >= LEAST_BYTES:
                self._submit(self._stocking, self._spares.stock, size)

    def _read(self, evaluation: Evaluation, node: Node, source: Source) -> None:
        self._sources[source] = None
        future = self._submit(self._reading, evaluation.read, node)
        if future is not None:
            evaluation.ahead[node] = partial(_value_of, future, evaluation, node)

    def _submit(self, thread: ThreadPoolExecutor, function: Any, *args: Any) -> Future[Any] | None:
        try:
            future = thread.submit(function, *args)
        except RuntimeError:  # no thread can be started any more: nothing is read ahead
            return None
        self._cores.helpers = 2
        return future


def _value_of(future: Future[Value], evaluation: Evaluation, node: Node) -> Value:
    """What was read; read here if the thread has not begun to."""
    if future.cancel():
        return evaluation.read(node)
    while not wait([future], timeout=_LOOK_SECONDS).done:
        pass
    return future.result()
