"""Quantized tensors and the rest of torch: graphs, transforms of functions, shared memory."""

from __future__ import annotations

from typing import Any

import einops
import numpy
import pytest
import torch
import torch.nn.functional as F

from tests.support.quantized_kinds import (
    COLUMNS,
    HEADS,
    ROWS,
    Kind,
    assert_near,
    dense_matrix,
    some_kinds,
)
from tl_fastload import quantized


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outliers_leave_the_graph_of_the_activations_alone(dtype: torch.dtype) -> None:
    """bitsandbytes writes into float16 activations that have outliers, and puts them back."""
    weight = quantized.quantize(dense_matrix(ROWS, COLUMNS), "int8", dtype=dtype)
    leaf = torch.randn(3, COLUMNS, dtype=dtype, requires_grad=True)
    x = leaf * 20
    (x.square().sum() + F.linear(x, weight).sum()).backward()  # the square needs x as it was
    expected = 800 * leaf.detach().float() + 20 * weight.dequantize().float().sum(0)
    assert leaf.grad is not None
    assert_near(leaf.grad, expected, 1e-2)


@some_kinds
def test_a_parameter_is_a_weight_not_an_activation(kind: Kind) -> None:
    """`model.W_E @ attn.W_V[0]`, a neuron's input in terms of tokens: no rounding of either."""
    weight = kind.make().float()
    embedding = torch.nn.Parameter(torch.randn(7, COLUMNS))
    expected = embedding @ weight.dequantize().T
    assert torch.equal(embedding @ weight.T, expected)
    assert torch.equal(F.linear(embedding, weight), expected)
    product = embedding.detach() @ weight.T
    assert torch.equal(product, expected) == (kind.kind != "int8")


@some_kinds
def test_transforms_of_functions(kind: Kind) -> None:
    """torch.func and forward mode see the dequantized weight, for which torch has all rules."""
    weight, x = kind.make().float(), kind.activations(5, COLUMNS).float()
    dense, direction = weight.dequantize(), torch.randn(5, COLUMNS)
    heads = einops.rearrange(weight, "(h e) d -> h d e", h=HEADS)

    def linear(x: torch.Tensor, matrix: Any = weight) -> torch.Tensor:
        return F.linear(x, matrix)

    def per_head(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...d,hde->...he", x, heads).flatten(-2)

    for function in (linear, per_head, lambda x: x @ weight.T):
        assert_near(torch.func.jacrev(function)(x[0]), dense, 1e-6)
        assert_near(torch.func.jacfwd(function)(x[0]), dense, 1e-6)
        assert_near(torch.func.vmap(function)(x), x @ dense.T, 1e-6)
        assert_near(torch.func.jvp(function, (x,), (direction,))[1], direction @ dense.T, 1e-6)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, direction)
            tangent = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
            assert tangent is not None
            assert_near(tangent, direction @ dense.T, 1e-6)
    assert_near(torch.func.grad(lambda x: linear(x).sum())(x), dense.sum(0).expand_as(x), 1e-6)


@some_kinds
def test_bytes_are_what_is_shared_with_others(kind: Kind) -> None:
    """The tensor has no memory of its own: torch would share, or lend, a null pointer."""
    weight = torch.nn.Parameter(kind.make().float(), requires_grad=False)
    dense = weight.dequantize()
    assert not weight.is_shared()
    assert weight.share_memory_() is weight
    assert weight.is_shared()
    assert all(tensor.is_shared() for tensor in weight.content.tensors().values())
    assert torch.equal(weight.dequantize(), dense)
    assert (numpy.from_dlpack(weight.detach()) == dense.numpy()).all()
