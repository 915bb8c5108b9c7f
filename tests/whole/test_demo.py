"""What `make demo` prints is what was measured."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.measure import Case, Measurement
from demo import first_look, versus_stock
from tl_fastload.faces import installed

LEAN = Measurement(
    name="lean",
    seconds=(0.5,),
    peak_anonymous_bytes=100_000_000,
    peak_resident_bytes=200_000_000,
    facts={"parameter_bytes": 90_000_000, "forward_seconds": {"1": 0.1, "64": 0.25}},
)
STOCK = replace(
    LEAN,
    name="stock",
    seconds=(2.0,),
    peak_anonymous_bytes=270_000_000,
    peak_resident_bytes=360_000_000,
    facts={"parameter_bytes": 90_000_000, "forward_seconds": {"1": 0.5, "64": 0.3}},
)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=100)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Measurement]:
    """What the first measuring of each road returns; nothing is run."""
    results = {"lean": LEAN, "stock": STOCK}
    seen: list[str] = []

    def run_case(case: Case, *_: Any) -> Measurement:
        road = case.road.removeprefix("bridge-")
        found = results[road]
        seen.append(road)
        return found if seen.count(road) == 1 else disturbed(found)

    monkeypatch.setattr(versus_stock, "run_case", run_case)
    monkeypatch.setattr(versus_stock, "make_checkpoint", lambda name: Path(name))
    return results


def disturbed(run: Measurement) -> Measurement:
    """The same run while something else used the machine: twice the time, the same memory."""
    forward = {n: 2 * seconds for n, seconds in run.facts.get("forward_seconds", {}).items()}
    seconds = tuple(2 * s for s in run.seconds)
    return replace(run, seconds=seconds, facts={**run.facts, "forward_seconds": forward})


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(console: Console, label: str) -> list[str]:
    line = next(line for line in printed(console).splitlines() if label in line)
    return [cell.strip() for cell in line.strip("│ ").split("│")][1:]


@pytest.mark.parity
@pytest.mark.parametrize("road", installed())
def test_the_embedded_model_is_shown(console: Console, road: str) -> None:
    first_look.show(console, road)
    assert "LoadReport" in printed(console)
    assert row(console, "1.0 ")[-1] == "induction head"
    assert row(console, "any parameter")[-1] == "0.0e+00"


@pytest.mark.parametrize(
    ("label", "cells"),
    [
        ("peak anonymous memory", ["2.7x", "100 MB", "270 MB"]),
        ("peak resident memory", ["1.8x", "200 MB", "360 MB"]),
        ("load time", ["4.0x", "0.500 s", "2.000 s"]),
        ("forward time, 1 token ", ["5.0x", "0.100 s", "0.500 s"]),
        ("forward time, 64 tokens", ["1.2x", "0.250 s", "0.300 s"]),
    ],
)
def test_ratios_say_how_much_better_lean_is(
    console: Console, measured: dict[str, Measurement], label: str, cells: list[str]
) -> None:
    versus_stock.show(console)
    assert row(console, label) == cells


def test_a_load_that_cannot_be_measured_ends_the_demo_with_the_reason(
    console: Console, measured: dict[str, Measurement]
) -> None:
    measured["stock"] = Measurement("stock", error="not measured: needs 6 GB, 2 GB free")
    with pytest.raises(SystemExit, match="needs 6 GB, 2 GB free"):
        versus_stock.show(console)


@pytest.mark.slow
def test_the_comparison_runs_for_real(console: Console) -> None:
    versus_stock.show(console, "tiny-gpt2")
    assert row(console, "peak anonymous memory")[0].endswith("x")
