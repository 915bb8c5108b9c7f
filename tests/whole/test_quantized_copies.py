"""Copies, moves and saving of every kind of quantized tensor."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import einops
import pytest
import torch
import torch.nn.functional as F

from tests.support.quantized_kinds import (
    COLUMNS,
    HEADS,
    KINDS,
    ROWS,
    Kind,
    assert_near,
    every_kind,
    is_bytes,
    save_and_load,
    some_kinds,
)
from tl_fastload.errors import QuantizationError
from tl_fastload.quantized import QuantizedTensor


class Block(torch.nn.Module):
    """A parameter in TransformerLens' shape, multiplied as a matrix, and a linear layer's."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        heads = einops.rearrange(weight, "(h e) d -> h d e", h=HEADS)
        self.W_Q = torch.nn.Parameter(heads, requires_grad=False)
        self.linear = torch.nn.Linear(1, 1, bias=False)
        self.linear.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = einops.rearrange(self.W_Q, "h d e -> (h e) d")
        return torch.cat([F.linear(x, w), self.linear(x)], -1)


def _bytes_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [t for p in module.parameters() for t in p.content.tensors().values()]


@every_kind
def test_a_module_survives_copies_and_moves(kind: Kind) -> None:
    block = Block(kind.make())
    x = kind.activations(2, 5, COLUMNS)
    expected = block(x)
    assert [p.numel() for p in block.parameters()] == [ROWS * COLUMNS] * 2
    original = [t.clone() for t in _bytes_of(block)]
    copied = copy.deepcopy(block)
    own = {t.data_ptr() for t in _bytes_of(copied)}
    assert own.isdisjoint({t.data_ptr() for t in _bytes_of(block)})
    moved = [
        copied,
        copy.deepcopy(block).to("cpu"),
        copy.deepcopy(block).cpu().eval(),
        copy.deepcopy(block).to(kind.dtype),
        copy.deepcopy(block).to(torch.float64).to(kind.dtype),
        save_and_load(block, weights_only=False),
        pickle.loads(pickle.dumps(block)),
        copy.copy(block),
    ]
    for module in moved:
        assert torch.equal(module(x), expected)
        assert torch.equal(module(x), expected)
        for parameter in module.parameters():
            assert isinstance(parameter, QuantizedTensor)
            assert isinstance(parameter, torch.nn.Parameter)
            assert parameter.dtype == kind.dtype
        for ours, theirs in zip(_bytes_of(module), original, strict=True):
            assert torch.equal(ours, theirs)


@every_kind
def test_a_dtype_never_touches_bytes(kind: Kind) -> None:
    weight = kind.make()
    assert (weight.content.compute_dtype is not None) == (kind.kind in ("nf4", "fp4"))
    for cast in (weight.half(), weight.bfloat16(), weight.float(), weight.double()):
        assert is_bytes(cast)
        for name, tensor in cast.content.tensors().items():
            assert tensor.data_ptr() == weight.content.tensors()[name].data_ptr()
        if cast.dtype != weight.dtype and weight.content.compute_dtype is not None:
            assert cast.content.compute_dtype == cast.dtype
        x = kind.activations(3, COLUMNS).to(cast.dtype)
        assert F.linear(x, cast).dtype == cast.dtype
        assert cast.dequantize().dtype == cast.dtype
        assert_near(cast.dequantize(), weight.dequantize(), 1e-2)
        assert_near(F.linear(x, cast), F.linear(x, cast.dequantize()), 2e-2)


@every_kind
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_round_trip(kind: Kind, assign: bool) -> None:
    block, other = Block(kind.make()), Block(kind.make(seed=7))
    x = kind.activations(2, 5, COLUMNS)
    expected = block(x)
    assert not torch.equal(other(x), expected)
    state = save_and_load(block.state_dict(), weights_only=True)
    assert set(state) == {"W_Q", "linear.weight"}
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(x), expected)
    assert all(not p.requires_grad for p in other.parameters())
    if not assign:
        own = {t.data_ptr() for t in _bytes_of(other)}
        assert own.isdisjoint(
            {t.data_ptr() for value in state.values() for t in value.content.tensors().values()}
        )


@some_kinds
def test_bytes_are_not_loaded_into_another_layout(kind: Kind) -> None:
    weight = kind.make()
    with pytest.raises(QuantizationError, match="assign=True"):
        kind.make(rows=COLUMNS, columns=ROWS * 8)[:ROWS, :COLUMNS].copy_(weight)
    plain = torch.zeros(ROWS, COLUMNS, dtype=weight.dtype)
    assert torch.equal(plain.copy_(weight), weight.dequantize())


@some_kinds
def test_flattens_into_its_tensors(kind: Kind) -> None:
    weight = kind.make().scale_input(torch.rand(COLUMNS))[2:8].T
    names, context = weight.__tensor_flatten__()
    inner = {name: getattr(weight, name) for name in names}
    assert set(inner) == set(weight.content.tensors())
    made = QuantizedTensor.__tensor_unflatten__(inner, context, weight.shape, weight.stride())
    assert torch.equal(made.dequantize(), weight.dequantize())
    assert made.stride() == weight.stride()
    with pytest.raises(AttributeError, match="no attribute"):
        _ = weight.nothing


@some_kinds
def test_a_move_takes_everything_along(kind: Kind) -> None:
    weight = kind.make().scale_input(torch.rand(COLUMNS)).to("meta")
    assert weight.device.type == "meta"
    assert {t.device.type for t in weight.content.tensors().values()} == {"meta"}


@pytest.mark.parametrize("swap", [False, True])
def test_data_can_be_replaced_as_old_torch_moves_modules(swap: bool) -> None:
    kind = KINDS[0]
    parameter = torch.nn.Parameter(kind.make(), requires_grad=False)
    other = kind.make(seed=7).half()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        parameter.data = other
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert torch.equal(parameter.dequantize(), other.dequantize())
    assert parameter.dtype == torch.float16
    x = kind.activations(3, COLUMNS)
    assert torch.equal(F.linear(x, parameter), F.linear(x, other))
    assert is_bytes(parameter.data)


@pytest.mark.gpu
@every_kind
def test_on_a_gpu(kind: Kind) -> None:
    block = Block(kind.make()).to("cuda")
    assert {t.device.type for t in _bytes_of(block)} == {"cuda"}
    x = kind.activations(2, 5, COLUMNS).to("cuda").requires_grad_(True)
    out = block(x)
    dense = torch.cat([p.dequantize() for p in [block.linear.weight] * 2])
    assert_near(out, F.linear(x, dense), max(kind.error, 1e-3))
    out.sum().backward()
    assert x.grad is not None
    assert_near(x.grad, dense.sum(0).expand_as(x), 2e-2)
    assert torch.equal(copy.deepcopy(block)(x), out)
    assert torch.equal(block.cpu().linear.weight.dequantize(), kind.make().dequantize())
