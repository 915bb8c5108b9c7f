"""How the cost of a load and of a plan grows with the number of layers: models whose weights take
no time, so that what is left is bookkeeping.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.bounds import Check
from tl_fastload.cli.bench.synthetic import parse_shape, write_checkpoint

LAYERS = (80, 160, 320, 640)
TWICE_AT_MOST = 2.2
"""What twice the layers may take, in times of CPU."""

_UNPROCESSED = dict.fromkeys(
    ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
)


def measure(layers: tuple[int, ...] = LAYERS) -> dict[str, list[float]]:
    """CPU seconds of this process for each kind of call, one for each number of layers.

    Args:
        layers: how many layers the models have, in growing order.
    """
    import tl_fastload

    lean = tl_fastload.LeanHookedTransformer.from_pretrained_lean
    calls: dict[str, Callable[[Path], Any]] = {
        "load, processed": lambda folder: lean(folder, device="cpu", progress=False),
        "load, unprocessed": lambda folder: lean(
            folder, device="cpu", progress=False, **_UNPROCESSED
        ),
        "plan": lambda folder: tl_fastload.plan(folder, device="cpu"),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    with tempfile.TemporaryDirectory() as home, contextlib.redirect_stdout(io.StringIO()):
        for count in (1, *layers):  # the first makes the libraries run once
            shape = parse_shape(
                f"llama:n_layers={count},d_model=32,n_heads=2,n_kv_heads=2,d_mlp=64,d_vocab=64,"
                "n_ctx=32,dtype=float32"
            )
            folder = Path(home, str(count))
            write_checkpoint(shape, folder)
            for name, call in calls.items():
                gc.collect()
                start = time.process_time()
                call(folder)
                found[name].append(time.process_time() - start)
    return {name: seconds[1:] for name, seconds in found.items()}


def exponent(layers: tuple[int, ...], seconds: list[float]) -> float:
    """The power of the number of layers that the cost grows with, between the last two."""
    return math.log(seconds[-1] / seconds[-2]) / math.log(layers[-1] / layers[-2])


def show(console: Console, found: dict[str, list[float]], layers: tuple[int, ...] = LAYERS) -> None:
    """Print what was measured."""
    table = Table("layers", *map(str, layers), "exponent", title="CPU seconds, tiny layers")
    for name, seconds in found.items():
        power = exponent(layers, seconds)
        table.add_row(name, *(f"{one:.2f}" for one in seconds), f"{power:.2f}")
    console.print(table)


def checks(found: dict[str, list[float]]) -> list[Check]:
    """Whether twice the layers take about twice the time."""
    return [
        Check(
            f"{LAYERS[-1]} layers", f"{name}, of {LAYERS[-2]}", times[-1] / times[-2], TWICE_AT_MOST
        )
        for name, times in found.items()
    ]
