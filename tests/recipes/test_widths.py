"""What is said to give the same bits in any number of threads does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from tl_fastload.recipes.nodes import aten
from tl_fastload.recipes.widths import same_in_any_width

WIDTHS = (2, 3, 4, 6, 8, 16)
SIZES = (1, 2, 3, 4, 8, 12, 16, 25, 32, 64, 80, 96, 100, 128, 257, 512, 768, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def width_given_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def in_width(width: int, func: Any, arguments: list[Any]) -> torch.Tensor:
    torch.set_num_threads(width)
    found: torch.Tensor = func(*arguments)
    return found


def some_sum(chance: random.Random) -> tuple[Any, list[Any]]:
    """A sum or mean of random values over random dimensions, in a random order of memory; every
    other time of few matrices, each over its rows: there, threads share what a vector loop takes.
    """
    is_few = chance.random() < 0.5
    shape = [chance.choice(SIZES) for _ in range(chance.choice((2, 2, 3, 3, 4)))]
    while not 40_000 < torch.Size(shape).numel() < 1_000_000:
        shape = [chance.choice(SIZES) for _ in shape]
    if is_few:
        shape = [chance.randint(1, 3), chance.choice((512, 1024)), chance.randint(32, 160)]
    order = list(range(len(shape)))
    if not is_few:
        chance.shuffle(order)
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
    values = torch.randn([shape[dim] for dim in order], generator=generator)
    operand = values.to(chance.choice(DTYPES)).permute([order.index(n) for n in range(len(shape))])
    dims = [1] if is_few else chance.sample(range(len(shape)), chance.randint(1, len(shape) - 1))
    return chance.choice((aten.mean.dim, aten.sum.dim_IntList)), [operand, dims, True]


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(8))
def test_sums_that_are_said_to_be_the_same_are(seed: int) -> None:
    chance = random.Random(seed)
    said = 0
    for _ in range(30):
        func, arguments = some_sum(chance)
        expected = in_width(1, func, arguments)
        for width in WIDTHS:
            if same_in_any_width(func, arguments, width):
                said += 1
                assert torch.equal(in_width(width, func, arguments), expected), arguments[1:]
    assert said > 20


def test_a_sum_that_differs_is_not_said_to_be_the_same() -> None:
    operand = torch.randn(2, 1024, 100, generator=torch.Generator().manual_seed(0))
    assert not same_in_any_width(aten.sum.dim_IntList, [operand, [1], True], 8)
    assert not same_in_any_width(aten.sum.dim_IntList, [operand.flatten()[None], [0, 1]], 8)
    assert not same_in_any_width(aten.var.correction, [operand, [1]], 8)
    assert not same_in_any_width(aten.mm.default, [operand[0], operand[0].T], 8)
    assert same_in_any_width(aten.mm.default, [operand[0], operand[0].T], 1)

    column = torch.randn(1031, 1, generator=torch.Generator().manual_seed(0))
    rows = column.t().expand(257, 1031).t()[..., None].expand(1031, 257, 1)
    assert not same_in_any_width(aten.mean.dim, [rows, [2, 1], True], 8)  # [2] is one element


def test_a_sum_with_a_factor_is_not_said_to_be_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    arguments = [torch.randn(1024, 129, generator=generator), torch.tensor([[2.7]])]
    for alpha in (1, -1, 0.3):
        expected = in_width(1, partial(aten.add.Tensor, alpha=alpha), arguments)
        found = in_width(8, partial(aten.add.Tensor, alpha=alpha), arguments)
        said = same_in_any_width(aten.add.Tensor, arguments, 8, {"alpha": alpha})
        assert said == (alpha != 0.3)
        assert torch.equal(found, expected) or not said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "order", "dim"),
    [
        ((12, 768, 64), (1, 0, 2), 1),  # W_Q of GPT-2 as its file has it, summed for b_Q
        ((12, 64, 768), (0, 1, 2), 2),  # W_O, centred
        ((768, 3072), (0, 1), 0),  # W_in, centred
        ((3072, 768), (0, 1), 1),  # W_out, centred
    ],
)
def test_what_processing_sums_may_run_beside_helpers(
    shape: tuple[int, ...], order: tuple[int, ...], dim: int, dtype: torch.dtype
) -> None:
    operand = torch.empty([shape[n] for n in order], dtype=dtype)
    operand = operand.permute([order.index(n) for n in range(len(shape))])
    assert same_in_any_width(aten.mean.dim, [operand, [dim], True], 2)
