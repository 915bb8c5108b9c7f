"""The second half of the demo: lean against stock loading, on a model big enough to matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import bridge, cases
from benchmarks.measure import Case, Measurement, run_case
from benchmarks.models import make_checkpoint
from tl_fastload.faces import installed

MODEL = "gpt2-medium"
DTYPE = "float32"
RUNS = 2  # other work on the machine can only add time: the faster of two runs is nearer the truth
Runs = list[Measurement]


def show(console: Console, model: str = MODEL) -> None:
    """Measure lean and stock loads in turn, each in a fresh process, and print the ratios.

    Args:
        console: where to print.
        model: a key of `benchmarks.models.SHAPES`.

    Raises:
        SystemExit: a load could not be measured; says why.
    """
    with console.status(f"writing random weights in the shape of {model}"):
        make_checkpoint(model)
    roads: Any = bridge if installed()[0] == "bridge" else cases
    lean: Runs = []
    stock: Runs = []
    for turn in range(1, RUNS + 1):
        with console.status(f"loading {model} with tl_fastload ({turn} of {RUNS})"):
            lean.append(_measure(roads.lean(model, DTYPE)))
        with console.status(f"loading {model} with stock TransformerLens ({turn} of {RUNS})"):
            stock.append(_measure(roads.stock(model, DTYPE)))
    console.print(_table(model, lean, stock))
    console.print(
        f"Each {RUNS} times in a fresh process: fastest time, largest peak above the imports.\n"
        f"The parameters themselves take {_megabytes(lean[0].parameter_bytes)}. "
        "`make bench` measures more, and takes medians."
    )


def _measure(case: Case) -> Measurement:
    found = run_case(replace(case, forward_tokens=cases.FORWARD_TOKENS))
    if found.error is not None:
        raise SystemExit(f"The comparison could not be made. {case.name}: {found.error}")
    return found


def _table(model: str, lean: Runs, stock: Runs) -> Table:
    table = Table(
        title=f"{model}, {DTYPE}, processed: lean against stock",
        title_style="",
    )
    for column in ("", "lean is better by", "lean", "stock"):
        table.add_column(column, justify="right" if column else "left")
    for label, of in (
        ("peak anonymous memory", "peak_anonymous_bytes"),
        ("peak resident memory", "peak_resident_bytes"),
    ):
        mine, theirs = (max(getattr(run, of) for run in runs) for runs in (lean, stock))
        table.add_row(label, _ratio(theirs, mine), _megabytes(mine), _megabytes(theirs))
    times = [("load time", *(min(run.median_seconds for run in runs) for runs in (lean, stock)))]
    for tokens in cases.FORWARD_TOKENS:
        label = f"forward time, {tokens} token{'s' * (tokens > 1)}"
        times.append((label, _forward(lean, tokens), _forward(stock, tokens)))
    for label, mine, theirs in times:
        table.add_row(label, _ratio(theirs, mine), f"{mine:.3f} s", f"{theirs:.3f} s")
    return table


def _forward(runs: Runs, tokens: int) -> float:
    return min(float(run.facts["forward_seconds"][str(tokens)]) for run in runs)


def _ratio(theirs: float, mine: float) -> str:
    return f"[bold]{theirs / mine:.1f}x[/]"


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f} MB"
