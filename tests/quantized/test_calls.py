"""The ways in which TransformerLens' components use their weights, each on the road it should take.

The components' own lines, with plain torch and einops: what must run on the kernel, and what sees
values.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import einops
import pytest
import torch
import torch.nn.functional as F

from tl_fastload import quantized
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.quantized.formats.bitsandbytes_bytes import FourBitBytes, Int8Bytes

HEADS, D_HEAD, D_MODEL, D_MLP = 4, 32, 128, 192

MODES: dict[str, Any] = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


class Roads:
    """Counts what was multiplied by a kernel, and what was dequantized."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel = self.dense = 0
        for stored in (Int8Bytes, FourBitBytes):
            for method, road in (("linear", "kernel"), ("dense", "dense")):
                self._count(monkeypatch, stored, method, road)

    def _count(self, monkeypatch: pytest.MonkeyPatch, cls: Any, method: str, road: str) -> None:
        real = getattr(cls, method)

        def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
            setattr(self, road, getattr(self, road) + 1)
            result: torch.Tensor = real(*args, **kwargs)
            return result

        monkeypatch.setattr(cls, method, counted)


@pytest.fixture
def roads(monkeypatch: pytest.MonkeyPatch) -> Roads:
    return Roads(monkeypatch)


@pytest.fixture(params=["int8", "nf4", "fp4"])
def kind(request: Any) -> str:
    return str(request.param)


def _weight(kind: str, out: int, columns: int) -> QuantizedTensor:
    dense = torch.randn(out, columns, generator=torch.Generator().manual_seed(0))
    return quantized.quantize(dense / columns**0.5, kind, double_quant=True)


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _parameter(weight: Any) -> Any:
    assert isinstance(weight, QuantizedTensor)
    return torch.nn.Parameter(weight, requires_grad=False)


def simple_attn_linear(input: Any, w: Any, b: Any) -> torch.Tensor:
    if input.device != w.device:
        w = w.to(input.device)
    w = einops.rearrange(w, "head_index d_model d_head -> (head_index d_head) d_model")
    b_ = einops.rearrange(b, "head_index d_head -> (head_index d_head)")
    return F.linear(input, w, b_).reshape(input.shape[0], input.shape[1], b.shape[0], b.shape[1])


def output_projection(z: Any, W_O: Any, b_O: Any) -> torch.Tensor:
    w = einops.rearrange(
        W_O, "head_index d_head d_model -> d_model (head_index d_head)"
    ).contiguous()
    w = w.to(z.device)
    if z.dtype != w.dtype:
        z = z.to(w.dtype)
    return F.linear(z.reshape(z.shape[0], z.shape[1], HEADS * D_HEAD), w, b_O)


def batch_addmm(bias: Any, weight: Any, x: Any) -> torch.Tensor:
    size_out = (*x.size()[:-1], weight.shape[-1])
    return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(size_out)


@pytest.mark.parametrize("mode", MODES)
def test_attention_runs_on_the_kernel(kind: str, mode: str, roads: Roads) -> None:
    matrix = _weight(kind, HEADS * D_HEAD, D_MODEL)
    W_Q = _parameter(einops.rearrange(matrix, "(n h) m -> n m h", n=HEADS))
    assert W_Q.shape == (HEADS, D_MODEL, D_HEAD)
    x, bias = _x(2, 5, D_MODEL), _x(HEADS, D_HEAD)
    expected = F.linear(x, matrix, bias.flatten())
    roads.kernel = 0
    with MODES[mode]():
        found = simple_attn_linear(x, W_Q, bias)
    assert torch.equal(found.flatten(2), expected)
    assert (roads.kernel, roads.dense) == (1, 0)


@pytest.mark.parametrize("mode", MODES)
def test_output_projection_runs_on_the_kernel(kind: str, mode: str, roads: Roads) -> None:
    matrix = _weight(kind, D_MODEL, HEADS * D_HEAD)
    W_O = _parameter(einops.rearrange(matrix, "m (n h) -> n h m", n=HEADS).to(device="cpu"))
    z, bias = _x(2, 5, HEADS, D_HEAD), _x(D_MODEL)
    expected = F.linear(z.flatten(2), matrix, bias)
    roads.kernel = 0
    with MODES[mode]():
        found = output_projection(z, W_O, bias)
    assert torch.equal(found, expected)
    assert (roads.kernel, roads.dense) == (1, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("style", ["mlp", "gated", "expert", "dict"])
def test_linear_maps_run_on_the_kernel(kind: str, mode: str, style: str, roads: Roads) -> None:
    matrix = _weight(kind, D_MLP, D_MODEL)
    W_in = _parameter(matrix.T)
    x, bias = _x(2, 5, D_MODEL), _x(D_MLP)
    expected = F.linear(x, matrix, bias)
    roads.kernel = 0
    with MODES[mode]():
        if style == "mlp":
            found = batch_addmm(bias, W_in, x)
        elif style == "gated":
            found = F.linear(x, W_in.T.contiguous(), bias)
        elif style == "expert":
            linear = torch.nn.Linear(D_MODEL, D_MLP)
            linear.weight, linear.bias = _parameter(matrix), torch.nn.Parameter(bias)
            found = linear(x)
        else:
            found = torch.matmul(x, W_in) + bias
    if style == "dict":
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)
    assert (roads.kernel, roads.dense) == (1, 0)


@pytest.mark.parametrize("mode", MODES)
def test_processed_weights_run_on_the_kernel(kind: str, mode: str, roads: Roads) -> None:
    matrix = _weight(kind, D_MODEL, HEADS * D_HEAD).scale_input(torch.ones(HEADS * D_HEAD))
    W_O = _parameter(einops.rearrange(matrix, "m (n h) -> n h m", n=HEADS).center_output())
    with MODES[mode]():
        found = output_projection(_x(2, 5, HEADS, D_HEAD), W_O, torch.zeros(D_MODEL))
    assert found.mean(-1).abs().max() < 1e-6
    assert (roads.kernel, roads.dense) == (1, 0)


def test_converters_keep_bytes(kind: str, roads: Roads) -> None:
    """Fused projections, taken apart in rows (Phi-3, GPT-2) and by head (NeoX, BLOOM)."""
    fused = _weight(kind, 3 * HEADS * D_HEAD, D_MODEL)
    x, bias = _x(2, 5, D_MODEL), torch.zeros(HEADS, D_HEAD)
    in_rows = [
        einops.rearrange(part, "(n h) m -> n m h", n=HEADS)
        for part in torch.split(fused, HEADS * D_HEAD)
    ]
    in_columns = [  # a `Conv1D` weight is [in, out]
        einops.rearrange(part, "m (i h) -> i m h", i=HEADS)
        for part in torch.tensor_split(fused.T, 3, dim=1)
    ]
    by_head = list(einops.rearrange(fused, "(i qkv h) m -> qkv i m h", i=HEADS, qkv=3))
    whole = F.linear(x, fused)
    thirds = whole.reshape(2, 5, 3, HEADS, D_HEAD).unbind(2)
    interleaved = whole.reshape(2, 5, HEADS, 3, D_HEAD).unbind(3)
    cases = [(in_rows, thirds), (in_columns, thirds), (by_head, interleaved)]
    for parts, expected in cases:
        for part, values in zip(parts, expected, strict=True):
            for weight in (part, _parameter(part.compact())):
                roads.kernel = 0
                found = simple_attn_linear(x, weight, bias)
                # A kernel may add in another order for another number of rows.
                torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-5)
                assert (roads.kernel, roads.dense) == (1, 0)
    held = sum(part.compact().content.stored.nbytes() for part in in_rows)
    assert held <= fused.content.stored.nbytes() + 2 * 4 * (
        16 + 256 + 1
    )  # three copies of the codes


def test_what_takes_the_dense_road(kind: str, roads: Roads) -> None:
    """`use_attn_result`, `use_split_qkv_input`, ungrouped heads, `model.W_Q`: exact values."""
    matrix = _weight(kind, HEADS * D_HEAD, D_MODEL)
    W_Q = _parameter(einops.rearrange(matrix, "(n h) m -> n m h", n=HEADS))
    W_O = _parameter(
        einops.rearrange(_weight(kind, D_MODEL, HEADS * D_HEAD), "m (n h) -> n h m", n=HEADS)
    )
    dense_Q, dense_O = W_Q.dequantize(), W_O.dequantize()
    x, z = _x(2, 5, HEADS, D_MODEL), _x(2, 5, HEADS, D_HEAD)
    pattern = (
        "batch pos head_index d_model, head_index d_model d_head -> batch pos head_index d_head"
    )
    roads.kernel = 0
    split = einops.einsum(x, W_Q, pattern)
    torch.testing.assert_close(split, einops.einsum(x, dense_Q, pattern))
    w = einops.rearrange(W_O, "head_index d_head d_model -> 1 1 head_index d_head d_model")
    assert torch.equal((z[..., None] * w).sum(-2), (z[..., None] * dense_O[None, None]).sum(-2))
    grouped = torch.repeat_interleave(W_Q, dim=0, repeats=2)
    assert torch.equal(grouped, torch.repeat_interleave(dense_Q, dim=0, repeats=2))
    assert torch.equal(torch.stack([W_Q, W_Q], dim=0)[1], dense_Q)
    assert torch.equal(W_Q @ W_Q.transpose(-1, -2), dense_Q @ dense_Q.transpose(-1, -2))
    assert torch.equal(matrix.T @ matrix, matrix.dequantize().T @ matrix.dequantize())
    assert roads.kernel == 0
    assert roads.dense > 0
