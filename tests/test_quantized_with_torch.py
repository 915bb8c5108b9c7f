"""Quantized tensors and the rest of torch: graphs, transforms of functions, shared memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantized_kinds import COLUMNS, ROWS, assert_near, dense_matrix

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
