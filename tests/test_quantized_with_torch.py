"""Quantized tensors and the rest of torch: graphs, transforms of functions, shared memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantized_kinds import COLUMNS, ROWS, Kind, assert_near, dense_matrix, some_kinds

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
