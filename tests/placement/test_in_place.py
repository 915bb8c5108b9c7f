"""Writing into memory that is read as well."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.allocations import Allocations
from tl_fastload.placement.writer import InPlaceWriter, Write
from tl_fastload.recipes.nodes import MemorySource


def run(targets: dict[str, torch.Tensor], sources: dict[str, torch.Tensor]) -> int:
    """Write, check the values, and return the most bytes that were set aside."""
    expected = {name: value.clone() for name, value in sources.items()}
    writes = [Write(name, targets[name], MemorySource(sources[name], name)) for name in sources]
    order: list[str] = []
    with Allocations() as allocations:
        InPlaceWriter(writes, lambda write: order.append(write.name)).run()
    for name, value in expected.items():
        assert torch.equal(targets[name], value.to(targets[name].dtype)), name
    assert len(order) == len(set(order))
    return allocations.peak_bytes


def matrices(count: int, size: int = 4) -> dict[str, torch.Tensor]:
    return {str(i): torch.arange(size * size).view(size, size) + 100.0 * i for i in range(count)}


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_a_circle_costs_one_tensor(shift: int) -> None:
    targets = matrices(7)
    names = list(targets)
    sources = {name: targets[names[(i + shift) % 7]] for i, name in enumerate(names)}
    assert run(targets, sources) == 64


def test_many_circles_cost_one_tensor() -> None:
    targets = matrices(8)
    pairs = {"0": "7", "7": "0", "1": "6", "6": "1", "2": "5", "5": "2"}
    assert run(targets, {name: targets[other] for name, other in pairs.items()}) == 64


def test_a_chain_costs_nothing() -> None:
    targets = matrices(50)
    sources = {str(i): targets[str(i + 1)] for i in range(49)}
    assert run(targets, sources) == 0
    assert run(targets, {str(i): targets[str(i - 1)] for i in range(1, 50)}) == 0


def test_its_own_values_are_left_alone() -> None:
    targets = matrices(3)
    versions = [target._version for target in targets.values()]
    assert run(targets, dict(targets)) == 0
    assert versions == [target._version for target in targets.values()]


def test_views_of_the_target_itself() -> None:
    targets = matrices(2)
    assert run(targets, {"0": targets["0"].t()}) == 64
    flat = torch.arange(20.0)
    assert run({"a": flat[:16]}, {"a": flat[4:]}) == 64
    assert run({"a": flat[0:20:2], "b": flat[1:20:2]}, {"a": flat[1:20:2], "b": flat[0:20:2]}) <= 80


def test_one_source_for_several_and_parts_of_one() -> None:
    targets = matrices(3)
    assert run(targets, {"0": targets["1"], "1": targets["0"], "2": targets["1"]}) == 64
    big = torch.arange(32.0)
    halves = {"a": big[:16], "b": big[16:]}
    assert run(halves, {"a": big[8:24], "b": big[:16]}) <= 128


def test_dtypes_and_single_numbers() -> None:
    target = torch.zeros(2, 3, dtype=torch.bfloat16).t()
    assert run({"a": target}, {"a": torch.randn(3, 2)}) == 0
    assert target.stride() == (1, 3)
    number = torch.zeros(())
    InPlaceWriter([Write("n", number, MemorySource(torch.ones(1)))]).run()
    assert number == 1


@settings(max_examples=200)
@given(st.permutations(range(6)), st.sets(st.integers(0, 5)), st.integers(0, 4))
def test_any_order_with_overlaps(order: list[int], left_out: set[int], offset: int) -> None:
    """Targets side by side in one buffer, sources anywhere in it."""
    flat = torch.arange(64.0)
    targets = {str(i): flat[10 * i : 10 * i + 8] for i in range(6)}
    starts = {i: min(10 * j + offset, 56) for i, j in enumerate(order) if i not in left_out}
    run(targets, {str(i): flat[start : start + 8] for i, start in starts.items()})


def test_every_small_map() -> None:
    for choice in itertools.product(range(4), repeat=4):
        targets = matrices(4, 2)
        run(targets, {str(i): targets[str(j)] for i, j in enumerate(choice)})
