"""One suite for every kind of quantized tensor: views, slices, kernels, gradients."""

from __future__ import annotations

import operator
from typing import Any

import einops
import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.quantized_kinds import (
    COLUMNS,
    HEADS,
    ROWS,
    Kind,
    assert_near,
    dense_matrix,
    every_kind,
    is_bytes,
    some_kinds,
)
from tl_fastload.errors import QuantizationError
from tl_fastload.quantized import QuantizedTensor


@every_kind
def test_reports_the_dense_matrix_and_holds_bytes(kind: Kind) -> None:
    layer = kind.layer(dense_matrix(ROWS, COLUMNS))
    weight = kind.tensor(layer)
    assert (weight.shape, weight.stride()) == ((ROWS, COLUMNS), (COLUMNS, 1))
    assert (weight.dtype, weight.device.type, weight.numel()) == (kind.dtype, "cpu", ROWS * COLUMNS)
    assert not weight.requires_grad
    tensors = weight.content.tensors()
    assert layer.weight.data_ptr() in {tensor.data_ptr() for tensor in tensors.values()}
    saved = [
        v for k, v in layer.state_dict().items() if "quant_state" not in k and "format" not in k
    ]
    offset = 4 if kind.double_quant else 0  # bitsandbytes saves the offset of the scales as text
    assert weight.nbytes_stored() == offset + sum(t.numel() * t.element_size() for t in saved)
    assert kind.kind in repr(weight)


@st.composite
def _view_programs(draw: Any) -> list[tuple[str, int, int]]:
    names = "transpose unflatten flatten select narrow step unsqueeze squeeze split expand permute"
    step = st.tuples(st.sampled_from(names.split()), st.integers(0, 7), st.integers(0, 7))
    return draw(st.lists(step, min_size=1, max_size=6))


def _step(tensor: Any, name: str, a: int, b: int) -> Any:
    """One view of a tensor, dense or quantized; None where it makes no sense."""
    dims = tensor.dim()
    if name == "unsqueeze":
        return tensor.unsqueeze(a % (dims + 1))
    if dims == 0:
        return None
    dim, size = a % dims, tensor.shape[a % dims]
    if name == "transpose":
        return tensor.transpose(dim, b % dims)
    if name == "permute":
        return tensor.permute([(i + a) % dims for i in range(dims)])
    if name == "unflatten":
        factor = (2, 3, 8)[b % 3]
        return tensor.unflatten(dim, (factor, -1)) if size % factor == 0 and size else None
    if name == "flatten":
        return tensor.flatten(dim, min(dim + 1, dims - 1))
    if name == "select":
        return tensor.select(dim, b % size)
    if name == "narrow":
        start = b % size
        return tensor.narrow(dim, start, max(1, (size - start) // 2))
    if name == "step":
        return tensor[(slice(None),) * dim + (slice(b % size, None, 2),)]
    if name == "split":
        return tensor.split(max(1, size // 2), dim)[-1]
    if name == "expand":
        return tensor.expand(2, *tensor.shape)
    return tensor.squeeze(dim)


@some_kinds
@settings(max_examples=60)
@given(program=_view_programs())
def test_views_show_what_they_would_of_the_dense_matrix(
    kind: Kind, program: list[tuple[str, int, int]]
) -> None:
    ours: Any = kind.make()
    theirs: Any = ours.dequantize()
    for step in program:
        seen = _step(theirs, *step)
        if seen is None:
            continue
        is_view = seen.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr()
        ours, theirs = _step(ours, *step), seen
        assert ours.shape == theirs.shape
        if is_view and is_bytes(ours):
            assert ours.stride() == theirs.stride()
        if not is_bytes(ours):
            assert not is_view  # only what copies may give up the bytes
            break
    found = ours.dequantize() if is_bytes(ours) else ours
    assert torch.equal(found, theirs)
    if not is_bytes(ours):
        return
    assert torch.equal(torch.clone(ours, memory_format=torch.contiguous_format) + 0, theirs)
    if ours.why_dense() is None:
        compact = ours.compact()
        assert torch.equal(compact.dequantize(), theirs)
        held = compact.content.stored.shape[0] * COLUMNS
        assert held == theirs.numel()
    if ours.dim() == 2 and ours.shape[1] > 0:
        x = kind.activations(4, ours.shape[1])
        assert_near(F.linear(x, ours), F.linear(x, theirs), 10 * kind.error)


@some_kinds
def test_copies_that_move_nothing_stay_bytes(kind: Kind) -> None:
    weight = kind.make()
    assert weight.contiguous() is weight
    assert weight.to(weight.device) is weight
    assert weight.to(weight.dtype) is weight
    heads = einops.rearrange(weight, "(h e) d -> h d e", h=HEADS)
    for same in (heads.clone(), heads.to(weight.dtype, copy=True), heads.detach()):
        assert is_bytes(same)
        assert same.stride() == heads.stride()
        assert torch.equal(same.dequantize(), heads.dequantize())
    assert not is_bytes(heads.contiguous())
    assert torch.equal(heads.contiguous(), heads.dequantize())


@some_kinds
def test_rows_are_taken_out_exactly(kind: Kind) -> None:
    """Fused projections: one after the other (Phi-3), and interleaved by head (NeoX, BLOOM)."""
    weight = kind.make(rows=3 * ROWS)
    dense = weight.dequantize()
    parts = [*weight.split(ROWS), weight[ROWS:], weight[5], weight[2::3]]
    expected = [*dense.split(ROWS), dense[ROWS:], dense[5], dense[2::3]]
    fused = einops.rearrange(weight, "(h qkv e) d -> qkv h d e", h=HEADS, qkv=3)
    parts += list(fused)
    expected += list(einops.rearrange(dense, "(h qkv e) d -> qkv h d e", h=HEADS, qkv=3))
    for part, values in zip(parts, expected, strict=True):
        rows = part.compact()
        assert rows.content.stored.shape == (values.numel() // COLUMNS, COLUMNS)
        assert torch.equal(rows.dequantize(), values)
        assert rows.nbytes_stored() < weight.nbytes_stored()
    matrix = einops.rearrange(parts[-1].compact(), "h d e -> (h e) d")
    assert is_bytes(matrix)
    x = kind.activations(2, 5, COLUMNS)
    rows = einops.rearrange(expected[-1], "h d e -> (h e) d")
    assert_near(F.linear(x, matrix), F.linear(x, rows), kind.error)
    shared = weight[ROWS : 2 * ROWS].compact().content.tensors()
    whole = weight.content.tensors()
    name = next(iter(whole))
    assert shared[name].untyped_storage().data_ptr() == whole[name].untyped_storage().data_ptr()


def test_nested_scales_of_rows_are_exact_wherever_the_rows_start() -> None:
    """Doubly quantized scales come in groups of 256: rows may start anywhere in one."""
    kind = Kind("nf4", "nf4", double_quant=True)
    weight = kind.make(rows=640, columns=128)  # two blocks a row: a group is 128 rows
    dense = weight.dequantize()
    for rows, group in ((slice(128, 384), 256), (slice(64, 320), 128), (slice(32, 600), 64)):
        part = weight[rows].compact()
        stored: Any = part.content.stored
        assert stored.nested_blocksize == group
        assert torch.equal(part.dequantize(), dense[rows])
        x = kind.activations(3, 128)
        assert torch.equal(F.linear(x, part), F.linear(x, dense[rows]))
    part = weight[1:7].compact()
    assert not part.content.stored.is_nested  # type: ignore[attr-defined]
    assert torch.equal(part.dequantize(), dense[1:7])


def test_rows_that_share_blocks_say_so_and_take_the_dense_road() -> None:
    kind = Kind("nf4", "nf4")
    weight = kind.make(rows=10, columns=96)
    dense = weight.dequantize()
    part = weight[1:3]
    assert "whole number of blocks" in str(part.why_dense())
    with pytest.raises(QuantizationError, match="whole number of blocks of 64"):
        part.compact()
    x = kind.activations(3, 96)
    assert torch.equal(F.linear(x, part), F.linear(x, dense[1:3]))
    assert weight[2:4].why_dense() is None  # two rows are three blocks
    assert torch.equal(weight[2:4].compact().dequantize(), dense[2:4])
    assert "whole rows" in str(weight[:, :64].why_dense())


@every_kind
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_maps_are_those_of_the_layer_bit_for_bit(kind: Kind, with_bias: bool) -> None:
    layer = kind.layer(dense_matrix(ROWS, COLUMNS))
    weight = kind.tensor(layer)
    x = kind.activations(2, 5, COLUMNS)
    bias = kind.activations(ROWS) if with_bias else None
    layer.bias = None if bias is None else torch.nn.Parameter(bias.clone(), requires_grad=False)
    expected = layer(x)
    flat = x.reshape(-1, COLUMNS)
    zero = torch.zeros(ROWS, dtype=kind.dtype) if bias is None else bias
    found = [
        F.linear(x, weight, bias),
        F.linear(flat, weight, bias),
        F.linear(x.unsqueeze(0), weight, bias)[0],
        torch.addmm(zero, flat, weight.T),
    ]
    if bias is None:
        found += [
            x @ weight.T,
            torch.matmul(x, weight.t()),
            torch.mm(flat, weight.T),
            flat.mm(weight.T),
        ]
        found += [
            x.matmul(weight.T),
            operator.matmul(x, weight.permute(1, 0)),
            zero.addmm(flat, weight.T),
            weight.T.__rmatmul__(x),
        ]
    for product in found:
        assert type(product) is torch.Tensor
        assert torch.equal(product.reshape(expected.shape), expected)


@every_kind
def test_gradients_reach_the_activations(kind: Kind) -> None:
    weight = kind.make()
    upstream = kind.activations(2, 5, ROWS)
    grads = []
    for matrix in (weight, weight.dequantize()):
        x = kind.activations(2, 5, COLUMNS).requires_grad_(True)
        F.linear(x, matrix).backward(upstream)
        assert x.grad is not None
        grads.append(x.grad)
    assert_near(grads[0], grads[1], {torch.float32: 1e-6}.get(kind.dtype, 1e-2))
    assert not weight.requires_grad
    assert weight.grad is None


@some_kinds
def test_the_dense_road_has_exact_values_and_gradients(kind: Kind) -> None:
    weight = einops.rearrange(kind.make(), "(h e) d -> h d e", h=HEADS)
    dense = weight.dequantize()
    x = kind.activations(2, 5, HEADS, COLUMNS)
    uses = [
        lambda w, x: torch.einsum("bphd,hde->bphe", x, w),
        lambda w, x: x.transpose(1, 2) @ w,
        lambda w, x: (x[..., None] * w).sum(-2),
        lambda w, x: x.transpose(1, 2) @ torch.stack([w, w])[1],
        lambda w, x: w + x[0, 0, :, :, None],
        lambda w, x: x.transpose(1, 2) @ torch.repeat_interleave(w, dim=0, repeats=2)[::2],
        lambda w, x: x[0, 0, :1] @ w[1],
    ]
    for use in uses:
        results = []
        for matrix in (weight, dense):
            leaf = x.clone().requires_grad_(True)
            out = use(matrix, leaf)
            out.square().sum().backward()
            results.append((out.detach(), leaf.grad))
        (ours, our_grad), (theirs, their_grad) = results
        if kind.kind == "int8" and use is uses[-1]:
            continue  # rows of one head: the kernel, tested above
        assert_near(ours, theirs, 1e-2 if kind.dtype != torch.float32 else 1e-6)
        assert_near(our_grad, their_grad, 2e-2 if kind.dtype != torch.float32 else 1e-6)


@some_kinds
def test_reading_values(kind: Kind) -> None:
    weight = kind.make().float()
    dense = weight.dequantize()
    torch.testing.assert_close(torch.linalg.svdvals(weight), torch.linalg.svdvals(dense))
    torch.testing.assert_close(weight.norm(dim=1), dense.norm(dim=1))
    assert torch.equal(weight[torch.tensor([3, 1])], dense[[3, 1]])
    assert weight[2, 3].item() == dense[2, 3].item()
    assert weight.tolist() == dense.tolist()
    assert (weight.numpy() == dense.numpy()).all()
    assert (numpy.asarray(weight) == dense.numpy()).all()
    assert torch.equal(weight, dense)
    assert torch.equal(
        weight @ weight.T, dense @ dense.T
    )  # a product of weights, not of activations
    assert torch.equal(torch.zeros(ROWS, COLUMNS).add_(weight), dense)
    assert torch.equal(weight.to(torch.int64), dense.to(torch.int64))


@some_kinds
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(kind: Kind, mode: Any) -> None:
    weight = kind.make()
    x = kind.activations(2, 5, COLUMNS)
    expected = F.linear(x, weight)
    with mode():
        assert torch.equal(F.linear(x, weight), expected)
        heads = einops.rearrange(weight, "(h e) d -> h d e", h=HEADS)
        assert torch.equal(F.linear(x, einops.rearrange(heads, "h d e -> (h e) d")), expected)
        assert torch.equal(heads + 0, heads.dequantize())


@some_kinds
def test_values_cannot_be_written(kind: Kind) -> None:
    weight = kind.make()
    writes = [
        lambda: weight.add_(1),
        lambda: weight.zero_(),
        lambda: operator.setitem(weight, 0, 1.0),
        lambda: weight[0].fill_(1),
        lambda: torch.add(weight, 1, out=weight),
        lambda: weight.copy_(torch.zeros(ROWS, COLUMNS)),
        lambda: torch.nn.init.normal_(weight),
        lambda: setattr(weight, "data", torch.zeros(ROWS, COLUMNS)),
    ]
    for write in writes:
        with pytest.raises(QuantizationError):
            write()
    grads = [
        lambda: weight.requires_grad_(True),
        lambda: setattr(weight, "requires_grad", True),
        lambda: torch.nn.Parameter(weight),
    ]
    for grad in grads:
        with pytest.raises(QuantizationError, match="requires_grad=False"):
            grad()
    assert weight.requires_grad_(False) is weight
    module = torch.nn.Module()
    module.quantized = torch.nn.Parameter(weight, requires_grad=False)
    module.dense = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.warns(UserWarning, match="leaves them frozen"):
        module.requires_grad_(True)
    assert [p.requires_grad for p in module.parameters()] == [False, True]
    module.requires_grad_(False)
    with pytest.raises(QuantizationError, match="cannot compute in"):
        QuantizedTensor(weight.content, None, torch.int8)


@some_kinds
def test_made_without_gradients_and_used_with_them(kind: Kind) -> None:
    with torch.inference_mode():
        weight = kind.quantize(dense_matrix(ROWS, COLUMNS)).T
    x = kind.activations(3, COLUMNS).float().requires_grad_(True)
    for product in (x @ weight, torch.einsum("bm,me->be", x, weight)):
        x.grad = None
        product.sum().backward()
        assert x.grad is not None
        assert_near(x.grad, weight.dequantize().sum(1).expand_as(x), 1e-5)
