"""Bookkeeping grows no faster than the number of parameters: the steps of Python are counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tl_fastload.placement.order import groups
from tl_fastload.placement.placer import _Waiting
from tl_fastload.placement.rehearsal import _Counter
from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise
from tl_fastload.source.reader import FileMaps
from tl_fastload.source.safetensors import TensorEntry


def _steps(run: Callable[[], Any]) -> int:
    """How many lines of Python a call runs, each pass of a loop or a comprehension included."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def _recipes(count: int) -> dict[str, Promise]:
    """A bias and a matrix that read the same weight, `count` times."""
    found = {}
    for number in range(count):
        weight = Promise.of(MemorySource(torch.ones(16, 16), f"w{number}"))
        found[f"w{number}"] = weight * 2
        found[f"b{number}"] = weight.sum(0)
    return found


def _in_order(count: int) -> Callable[[], Any]:
    recipes = _recipes(count)
    return lambda: groups(recipes)


def _held_back(count: int) -> Callable[[], Any]:
    recipes = _recipes(count)
    targets = {name: torch.zeros(recipe.shape) for name, recipe in recipes.items()}

    def run() -> None:
        waiting = _Waiting(recipes, targets, assign=False)
        for name in recipes:
            waiting.add(name, targets[name])

    return run


def _experts(count: int) -> Callable[[], Any]:
    stacked = torch.stack([Promise.of(MemorySource(torch.ones(4, 4))) for _ in range(count)])
    return lambda: [stacked[number] for number in range(count)]


def _rehearsed(count: int) -> Callable[[], Any]:
    counter = _Counter(torch.device("cpu"))
    held = []

    def run() -> None:
        with counter:
            for _ in range(count):
                held.append(torch.empty(4, device="meta"))
                counter.keep(held[-1])

    return run


def test_bookkeeping_is_linear() -> None:
    for prepare in (_in_order, _held_back, _experts, _rehearsed):
        once, twice = (_steps(prepare(count)) for count in (100, 200))
        assert twice <= 2.1 * once, (prepare.__name__, once, twice)


def test_mappings_are_found_in_a_few_steps(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(4 * 400))

    def mapped(count: int) -> Callable[[], Any]:
        maps = FileMaps()
        entries = [TensorEntry(f"{n}", torch.float32, (1,), path, 4 * n, 4) for n in range(count)]
        geometry = torch.empty(1, device="meta")
        return lambda: [maps.view(entry, geometry) for entry in reversed(entries)]

    once, twice = _steps(mapped(200)), _steps(mapped(400))
    assert twice <= 2.1 * once, (once, twice)
