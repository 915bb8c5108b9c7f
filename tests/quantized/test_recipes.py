"""Recipes that quantized bytes can follow, against the same steps on the dequantized matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import einops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.quantized_kinds import assert_near, dense_matrix
from tl_fastload import quantized
from tl_fastload.errors import QuantizationError
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.quantized.recipes import QuantizedSource, follow, reads_quantized
from tl_fastload.recipes.evaluate import evaluate
from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise

CPU = torch.device("cpu")
HEADS, D_HEAD, D_MODEL = 3, 32, 128
Step = Callable[[Any], Any]


def _pair(kind: str, rows: int, columns: int) -> tuple[Any, torch.Tensor]:
    """A promise of a quantized matrix, and its values."""
    tensor = quantized.quantize(dense_matrix(rows, columns), kind)
    return Promise.of(QuantizedSource.of(tensor, "w")), tensor.dequantize()


def _follow(promise: Any) -> QuantizedTensor:
    assert reads_quantized(promise.node)
    return follow(promise.node, CPU)


def _vector(size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(5)) + 0.5


def _promised(tensor: torch.Tensor) -> Any:
    return Promise.of(MemorySource(tensor, "ln.w"))


def _scaled(value: Any, scale: torch.Tensor) -> Any:
    return value * (_promised(scale) if isinstance(value, Promise) else scale)


# The steps that TransformerLens' converters and processing take.
HEAD_INPUT: dict[str, Step] = {
    "heads": lambda w: einops.rearrange(w, "(n h) m -> n m h", n=HEADS),
    "fold": lambda w: _scaled(
        einops.rearrange(w, "(n h) m -> n m h", n=HEADS), _vector(D_MODEL)[None, :, None]
    ),
    "fold and centre": lambda w: _centred_over_input(
        _scaled(einops.rearrange(w, "(n h) m -> n m h", n=HEADS), _vector(D_MODEL)[None, :, None])
    ),
    "in another dtype": lambda w: einops.rearrange(w, "(n h) m -> n m h", n=HEADS).float().clone(),
    "one head": lambda w: einops.rearrange(w, "(n h) m -> n m h", n=HEADS)[1],
}
MLP: dict[str, Step] = {
    "transposed": lambda w: w.T,
    "fold": lambda w: _scaled(w.T, _vector(D_MODEL)[:, None]),
    "fold and centre": lambda w: _centred(_scaled(w.T, _vector(D_MODEL)[:, None]), 0),
    "written to the residual stream": lambda w: _centred(w.T, -1),
    "twice folded": lambda w: _scaled(_scaled(w.T, _vector(D_MODEL)[:, None]), _vector(1)),
    "rows": lambda w: w[10:30].T,
}
HEAD_OUTPUT: dict[str, Step] = {
    "heads": lambda w: einops.rearrange(w, "m (n h) -> n h m", n=HEADS),
    "written to the residual stream": lambda w: _centred(
        einops.rearrange(w, "m (n h) -> n h m", n=HEADS), -1
    ),
}


def _centred_over_input(w: Any) -> Any:
    return w - einops.reduce(w, "head_index d_model d_head -> head_index 1 d_head", "mean")


def _centred(w: Any, dim: int) -> Any:
    return w - w.mean(dim, keepdim=True)


CASES = [
    *((HEADS * D_HEAD, D_MODEL, name, step) for name, step in HEAD_INPUT.items()),
    *((192, D_MODEL, name, step) for name, step in MLP.items()),
    *((D_MODEL, HEADS * 64, name, step) for name, step in HEAD_OUTPUT.items()),
]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize(("rows", "columns", "name", "step"), CASES)
def test_steps_of_processing(kind: str, rows: int, columns: int, name: str, step: Step) -> None:
    promise, values = _pair(kind, rows, columns)
    found, expected = _follow(step(promise)), step(values)
    assert found.shape == expected.shape
    assert_near(found.dequantize(), expected, 1e-6)
    evaluated = evaluate(step(promise).node, CPU).tensor
    assert_near(evaluated, expected, 1e-6)


REFUSED: dict[str, Step] = {
    "sum": lambda w: w + 1,
    "scaled by output": lambda w: _scaled(w.T, _vector(192)[None, :]),
    "squared": lambda w: w * w,
    "another matrix's mean": lambda w: w.T - _scaled(w.T, _vector(1)).mean(0, keepdim=True),
    "mean of a part": lambda w: _centred_over_part(w),
    "something subtracted": lambda w: w.T - _promised(_vector(192)),
    "centred, then scaled": lambda w: _scaled(_centred(w.T, 0), _vector(D_MODEL)[:, None]),
    "multiplied": lambda w: w @ w.T,
    "its largest": lambda w: w.max(0)[0],
}


def _centred_over_part(w: Any) -> Any:
    heads = einops.rearrange(w, "(n h) m -> n m h", n=HEADS)
    return heads - heads.mean(-1, keepdim=True)


@pytest.mark.parametrize("name", REFUSED)
def test_other_steps_need_values(name: str) -> None:
    promise, values = _pair("int8", 192, D_MODEL)
    recipe = REFUSED[name](promise)
    with pytest.raises(QuantizationError):
        _follow(recipe)
    expected = REFUSED[name](values)
    assert_near(evaluate(recipe.node, CPU).tensor, expected, 1e-6)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(["int8", "nf4", "fp4"]),
    fold=st.booleans(),
    center=st.sampled_from([None, 0, 1]),
    heads=st.sampled_from([1, 2, 3, 6]),
    first=st.integers(0, 2),
)
def test_any_combination(kind: str, fold: bool, center: int | None, heads: int, first: int) -> None:
    promise, values = _pair(kind, 96, D_MODEL)

    def steps(w: Any) -> Any:
        w = einops.rearrange(w, "(n h) m -> n m h", n=heads)
        w = _scaled(w, _vector(D_MODEL)[None, :, None]) if fold else w
        if center is not None:
            w = _centred_over_input(w) if center else w.clone()
        return w[min(first, heads - 1) :]

    found, expected = _follow(steps(promise)), steps(values)
    assert_near(found.dequantize(), expected, 1e-6)
    x = dense_matrix(4, D_MODEL, seed=2)
    matrix = einops.rearrange(found, "n m h -> (n h) m")
    product = torch.nn.functional.linear(x, matrix)
    assert_near(product, x @ matrix.dequantize().T, 2e-2 if kind == "int8" else 1e-5)


def test_recipes_without_quantized_matrices() -> None:
    assert not reads_quantized(_promised(_vector(3)).node)
    assert not reads_quantized((_promised(_vector(3)) * 2).node)
