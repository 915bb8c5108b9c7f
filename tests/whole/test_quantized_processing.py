"""Exact weight processing of every kind of quantized tensor, against the dense matrix."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import einops
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.quantized_kinds import (
    COLUMNS,
    D_HEAD,
    HEADS,
    KINDS,
    ROWS,
    Kind,
    assert_near,
    dense_matrix,
    every_kind,
    save_and_load,
    some_kinds,
)
from tl_fastload import quantized
from tl_fastload.errors import QuantizationError
from tl_fastload.quantized import QuantizedTensor


def _process(
    dense: torch.Tensor, scale: torch.Tensor | None, center_in: bool, center_out: bool
) -> torch.Tensor:
    """What TransformerLens does to a dense matrix [out, in]."""
    dense = dense.float() if scale is None else dense.float() * scale
    dense = dense - dense.mean(1, keepdim=True) if center_in else dense
    return dense - dense.mean(0, keepdim=True) if center_out else dense


def _processed(
    weight: QuantizedTensor, scale: torch.Tensor | None, center_in: bool, center_out: bool
) -> QuantizedTensor:
    weight = weight if scale is None else weight.scale_input(scale)
    weight = weight.center_input() if center_in else weight
    return weight.center_output() if center_out else weight


VARIANTS = list(itertools.product((False, True), repeat=3))


@every_kind
@pytest.mark.parametrize(("scaled", "center_in", "center_out"), VARIANTS)
def test_processing_is_that_of_the_dense_matrix(
    kind: Kind, scaled: bool, center_in: bool, center_out: bool
) -> None:
    plain = kind.make()
    scale = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(3)) + 0.5
    options: Any = (scale if scaled else None, center_in, center_out)
    weight = _processed(plain, *options)
    exact = _process(plain.float().dequantize(), *options)
    assert_near(weight.float().dequantize(), exact, 1e-5)
    for name, tensor in plain.content.tensors().items():
        assert weight.content.tensors()[name].data_ptr() == tensor.data_ptr()

    x = kind.activations(2, 5, COLUMNS).requires_grad_(True)
    bias = kind.activations(ROWS)
    out = F.linear(x, weight, bias)
    expected = F.linear(x.float(), exact, bias.float())
    bound = max(kind.error, 1e-5)
    assert_near(out, expected, bound)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out) * kind.activations(ROWS))
    assert_near(
        grad,
        torch.autograd.grad(expected, x, bias.float().expand_as(expected))[0],
        max(bound, 2e-2),
    )
    for same in (copy.deepcopy(weight), save_and_load(weight, False), weight.clone()):
        assert torch.equal(F.linear(x, same, bias), out)
    if kind.dtype == torch.float32 and center_out:
        assert (out - bias).mean(-1).abs().max() < 1e-5


@settings(max_examples=30)
@given(
    variant=st.sampled_from(VARIANTS),
    rows=st.integers(1, 40),
    columns=st.sampled_from([64, 128, 320]),
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(["int8", "nf4", "fp4"]),
)
def test_processing_of_any_matrix(
    variant: tuple[bool, bool, bool], rows: int, columns: int, seed: int, kind: str
) -> None:
    weight = quantized.quantize(
        dense_matrix(rows, columns, seed), kind, double_quant=bool(seed % 2)
    )
    scale = torch.randn(columns, generator=torch.Generator().manual_seed(seed))
    options: Any = (scale if variant[0] else None, *variant[1:])
    exact = _process(weight.dequantize(), *options)
    found = _processed(weight, *options).dequantize()
    assert (found - exact).norm() <= 1e-5 * (exact.norm() + 1e-3)


@some_kinds
def test_processing_of_views(kind: Kind) -> None:
    scale = torch.rand(COLUMNS) + 0.5
    dense = _process(kind.make().float().dequantize(), scale, True, False)
    weight = kind.make().float()
    heads = einops.rearrange(weight, "(h e) d -> h d e", h=HEADS).scale_input(scale).center_input()
    assert_near(heads.dequantize(), einops.rearrange(dense, "(h e) d -> h d e", h=HEADS), 1e-5)
    assert_near(heads[1].dequantize(), dense[D_HEAD : 2 * D_HEAD].T, 1e-5)
    assert heads[1].why_dense() is None
    centred = weight.center_output()
    assert "centred over rows" in str(centred[:D_HEAD].why_dense())
    assert_near(
        centred[:D_HEAD].dequantize(),
        _process(weight.dequantize(), None, False, True)[:D_HEAD],
        1e-5,
    )
    twice = weight.scale_input(scale).scale_input(scale)
    assert_near(twice.dequantize(), weight.dequantize() * scale**2, 1e-5)


def test_processing_that_has_no_exact_form() -> None:
    weight = KINDS[0].make()
    with pytest.raises(QuantizationError, match="scale it first"):
        weight.center_input().scale_input(torch.ones(COLUMNS))
    with pytest.raises(QuantizationError, match=f"{COLUMNS} inputs"):
        weight.scale_input(torch.ones(ROWS))
