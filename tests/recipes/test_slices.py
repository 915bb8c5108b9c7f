"""Parts of recipes are the parts of their values, bit for bit, and read no more than they show."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tl_fastload.recipes.evaluate import evaluate, sources
from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise
from tl_fastload.recipes.slices import Slices, as_promise

CPU = torch.device("cpu")
Recipe = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

CUT: dict[str, Recipe] = {
    "scaled": lambda w, b: w * b,
    "cast": lambda w, b: (w * b).to(torch.bfloat16).float() + 1,
    "heads": lambda w, b: (w * b).reshape(4, 3, 6).permute(0, 2, 1) * b[:, None],
    "turned": lambda w, b: (w * b).transpose(0, 1) * (w - b).t(),
    "merged": lambda w, b: (w * b).reshape(4, 3, 6).transpose(0, 1).reshape(12, 6) / b,
    "stacked": lambda w, b: torch.stack([w * b, w - b], 1),
    "joined": lambda w, b: torch.cat([w * b, w + b, w * 2], 0),
    "expanded": lambda w, b: (w * b)[:, None].expand(12, 3, 6) * 2,
    "expert": lambda w, b: torch.stack([w, w * b])[1] * b,
}
SUMMED: dict[str, Recipe] = {
    "centred": lambda w, b: w * b - (w * b).mean(0, keepdim=True),
    "bias": lambda w, b: b + (w * b).sum(0),
    "product": lambda w, b: w.T @ w,
}


def made_of(recipe: Recipe) -> tuple[Promise, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(12, 6, generator=generator)
    bias = torch.randn(6, generator=generator)
    made = recipe(*(Promise.of(MemorySource(tensor)) for tensor in (weight, bias)))
    assert isinstance(made, Promise)
    return made, recipe(weight, bias)


@pytest.mark.parametrize("name", [*CUT, *SUMMED])
def test_every_part_is_a_part_of_the_value(name: str) -> None:
    promise, value = made_of({**CUT, **SUMMED}[name])
    for dim in range(value.dim()):
        size = value.shape[dim]
        for start, length in ((0, 1), (size // 2, size - size // 2), (0, size), (size - 1, 1)):
            part = Slices().narrowed(promise.node, dim, start, length)
            wanted = value.narrow(dim, start, length)
            assert as_promise(part).shape == wanted.shape
            assert torch.equal(evaluate(part, CPU).tensor, wanted), (dim, start, length)


# A part of "merged" lies in many pieces, and the first third of "joined" is one matrix.
@pytest.mark.parametrize("name", sorted(CUT.keys() - {"merged", "joined"}))
def test_nothing_outside_of_the_part_is_read(name: str) -> None:
    promise, value = made_of(CUT[name])
    part = Slices().narrowed(promise.node, 0, 0, value.shape[0] // 3)
    read = max(view.geometry.numel() for view in sources(part))
    assert read <= 12 * 6 / 3


def test_an_empty_part_and_shared_steps() -> None:
    promise, _ = made_of(CUT["scaled"])
    slices = Slices()
    assert evaluate(slices.narrowed(promise.node, 0, 12, 0), CPU).tensor.shape == (0, 6)
    first, second = (slices.narrowed(promise.node, 0, 3, 2) for _ in range(2))
    assert first is second
