"""Bytes that are decoded a few rows at a time: the whole matrix's numbers, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.bridge.test_bridge_quantized import lean as bridge
from tests.support import quantized_packed as packed
from tests.support import quantized_zoo as qz
from tests.support import zoo as zoo_module
from tests.support.bridge_stock import quiet
from tests.support.comparison import lean_model
from tests.support.quantized_kinds import PackedKind, assert_near
from tl_fastload.quantized import QuantizedTensor, formats
from tl_fastload.quantized.formats import decoded
from tl_fastload.quantized.formats.scaled_bytes import scaled_bytes

ROWS, COLUMNS = 200, 256
every_packing = pytest.mark.parametrize("name", packed.PACKINGS)


def _weight(name: str, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    # Rows that are no whole number of words, where a format has such.
    rows = 192 if name == "awq" or name.startswith("gptq") else ROWS
    kind = PackedKind(name, packed.kind_of(name), dtype=dtype, packing=name)
    return kind.make(rows, COLUMNS)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`small_parts()`: from now on a part is as small as it can be."""
    return lambda: monkeypatch.setattr(decoded, "_PART_SIZE", 1)


@every_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_make_the_whole(name: str, dtype: torch.dtype, small_parts: Any) -> None:
    weight, whole = _weight(name, dtype), _weight(name, dtype).dequantize()
    x = torch.randn(2, 3, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.linspace(-1, 1, len(whole)).to(dtype)
    expected, shifted = F.linear(x, whole), F.linear(x, whole, bias)
    error = 1e-6 if dtype == torch.float32 else 1e-2
    for prepare in (lambda: None, small_parts):
        prepare()
        stored: Any = weight.content.stored
        assert torch.equal(weight.dequantize(), whole)
        assert_near(F.linear(x, weight), expected, error)
        assert_near(F.linear(x, weight, bias), shifted, error)
        assert F.linear(x[:0], weight).shape == (0, 3, len(whole))
    assert len(list(stored._parts())) > 1 or name in ("fp8-tensor", "modelopt", "ct-tensor")


@every_packing
def test_gradients_need_no_whole_matrix(name: str, small_parts: Any) -> None:
    weight, whole = _weight(name), _weight(name).dequantize()
    small_parts()
    x = torch.randn(5, COLUMNS, requires_grad=True)
    bias = torch.randn(len(whole), requires_grad=True)
    sizes: list[int] = []

    def packed_size(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(packed_size, lambda tensor: tensor):
        out = F.linear(x, weight, bias).square().sum()
    assert max(sizes, default=0) < whole.numel() / 4
    found = torch.autograd.grad(out, (x, bias), create_graph=True)
    again = torch.autograd.grad(found[0].square().sum(), x)[0]
    other = F.linear(x, whole, bias).square().sum()
    expected = torch.autograd.grad(other, (x, bias), create_graph=True)
    for one, two in zip(found, expected, strict=True):
        assert_near(one.detach(), two.detach(), 1e-5)
    assert_near(again, torch.autograd.grad(expected[0].square().sum(), x)[0], 1e-5)


@pytest.mark.parametrize(
    ("road", "case_id", "name"),
    [
        ("hooked", "mixtral", "packed-zeros"),
        ("hooked", "gpt-oss", "mxfp4"),
        ("bridge", "gpt-oss", "mxfp4"),
    ],
)
def test_only_experts_that_tokens_go_to_are_decoded(
    road: str, case_id: str, name: str, zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = qz.saved(qz.build(zoo, case_id), name)
    model = lean_model(source) if road == "hooked" else bridge(source, "raw")
    stored = formats.bytes_class("mxfp4" if name == "mxfp4" else "packed")
    decode, rows = stored.decode, []  # type: ignore[attr-defined]

    def counted(self: Any, first: int, last: int, out: torch.Tensor) -> None:
        rows.append(last - first)
        decode(self, first, last, out)

    monkeypatch.setattr(stored, "decode", counted)
    cfg, matrices = model.cfg, 2 if road == "bridge" else 3  # gate and up are one there
    for tokens in (1, 6):
        rows.clear()
        with torch.no_grad(), quiet():
            model(zoo_module.tokens(case_id)[:1, :tokens])
        per_layer = len(rows) / cfg.n_layers - (0 if name == "mxfp4" else 4)
        assert per_layer <= matrices * min(cfg.num_experts, tokens * cfg.experts_per_token)
        assert per_layer >= matrices * cfg.experts_per_token


def test_autocasting_chooses_the_dtype() -> None:
    weight = _weight("fp8")
    x = torch.randn(3, COLUMNS)
    with torch.autocast("cpu", torch.bfloat16):
        found = F.linear(x, weight)
        expected = F.linear(x, weight.dequantize())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("with_nan", [False, True])
def test_every_8_bit_float(dtype: torch.dtype, with_nan: bool) -> None:
    codes = torch.arange(256).to(torch.uint8).repeat(2, 1).view(dtype)
    expected = codes.float()
    if not with_nan:
        codes = codes.view(torch.uint8)[:, ~expected[0].isnan()].view(dtype)
        expected = codes.float()
    found = scaled_bytes(codes, torch.ones(2, 1), None, "fp8").dense(torch.float32)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert torch.equal(found.signbit(), expected.signbit())
