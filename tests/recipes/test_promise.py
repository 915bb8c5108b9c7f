"""The recording tensor: what it says about itself, what it records, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings

from tests.support.programs import CPU, DTYPES, STEPS, assert_same, in_memory, random_sources, run
from tl_fastload.errors import LeanLoadError, RecordingError
from tl_fastload.ground.geometry import dense_strides
from tl_fastload.recipes.evaluate import evaluate
from tl_fastload.recipes.live import live_tensors
from tl_fastload.recipes.nodes import (
    Call,
    MemorySource,
    Pick,
    Source,
    SourceView,
    aten,
    dtype_of,
    shape_of,
)
from tl_fastload.recipes.promise import Promise, node_of

SHAPES = ((4, 6), (6,), (2, 3, 4), (4, 6))


def promise(*shape: int, dtype: torch.dtype = torch.float32) -> Promise:
    generator = torch.Generator().manual_seed(0)
    return Promise.of(MemorySource(torch.randn(shape, generator=generator).to(dtype)))


def value_of(tensor: torch.Tensor) -> torch.Tensor:
    value: torch.Tensor = evaluate(node_of(tensor), CPU).tensor
    return value


class Counting(Source):
    """A source that counts how often it is read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.reads = tensor, 0
        self.name, self.shape, self.stride = "counted", tensor.shape, tensor.stride()
        self.dtype = tensor.dtype

    def lend(self, geometry: torch.Tensor) -> None:
        self.reads += 1

    def read_into(self, out: torch.Tensor, geometry: torch.Tensor, casts: Any) -> None:
        MemorySource(self.tensor).read_into(out, geometry, casts)


@settings(max_examples=100)
@given(program=STEPS)
def test_a_promise_looks_like_the_real_tensor(program: Any) -> None:
    tensors = random_sources(0, DTYPES, SHAPES)
    recorded, real = run(program, in_memory(tensors)), run(program, tensors)
    assert len(recorded) == len(real)
    for one, other in zip(recorded, real, strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        assert one.stride() == other.stride()
        assert one.is_contiguous() == other.is_contiguous()
        assert (one.numel(), one.element_size()) == (other.numel(), other.element_size())
        assert (one.dim(), one.is_floating_point()) == (other.dim(), other.is_floating_point())


def test_what_is_remembered_of_an_operation_is_what_decides_its_result() -> None:
    (whole,) = in_memory([torch.arange(6).view(2, 3)])
    (turned,) = in_memory([torch.arange(6).view(3, 2).T])
    for _ in range(2):
        kinds = [(whole * number).dtype for number in (True, 1, 1.0, 1 + 0j)]
        assert kinds == [torch.int64, torch.int64, torch.float32, torch.complex64]
        assert [(x * 2).stride() for x in (whole, turned)] == [(3, 1), (1, 2)]
        assert [whole.sum(dim).shape for dim in (0, 1)] == [(3,), (2,)]
        parts = [whole[1:], whole[:1], whole[1:]]
        assert [value_of(part).tolist() for part in parts] == [
            [[3, 4, 5]],
            [[0, 1, 2]],
            [[3, 4, 5]],
        ]
        assert value_of(whole[1:][:, 1:]).tolist() == [[4, 5]]  # of another place, the same form
        assert value_of(whole[:1][:, 1:]).tolist() == [[1, 2]]
        live = live_tensors({"live": torch.ones(2, 3)})["live"]
        sums = [live, live + 1, live + 1 + 1]  # of one form, each in memory of its own
        assert len({one.data_ptr() for one in sums}) == 3
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert (whole * 1.0).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_recording_reads_nothing() -> None:
    source = Counting(torch.randn(4, 6))
    recorded = torch.stack([Promise.of(source).T * 2, torch.ones(6, 4)]).sum(0).split(2)[0]
    assert source.reads == 0
    assert_same(value_of(recorded), (source.tensor.T * 2 + 1)[:2])
    assert source.reads == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.add_(1),
        lambda p: p.mul_(2.0),
        lambda p: p.zero_(),
        lambda p: p.fill_(3.0),
        lambda p: p.copy_(torch.zeros(4, 6)),
        lambda p: p.T.normal_(),
        lambda p: p[1].uniform_(),
        lambda p: p.__setitem__(0, 1.0),
        lambda p: p.__setitem__((slice(None), 2), torch.zeros(4)),
        lambda p: p.__iadd__(p),
        lambda p: p.clamp_(0, 1),
        lambda p: p.index_copy_(0, torch.tensor([0]), torch.zeros(1, 6)),
        lambda p: torch.add(p, 1, out=torch.empty(4, 6)),
        lambda p: torch.zeros(4, 6).copy_(p),
        lambda p: torch.zeros(4, 6).__setitem__(slice(None), p),
        lambda p: torch.nn.init.zeros_(p),
        lambda p: (p * 2).sub_(p),
        lambda p: p.resize_(3),
    ],
)
def test_writing_is_refused_and_named(write: Any) -> None:
    tensor = torch.ones(4, 6)
    recorded = Promise.of(MemorySource(tensor))
    with pytest.raises(RecordingError, match=r"aten\.\w+"):
        write(recorded)
    assert torch.equal(tensor, torch.ones(4, 6))
    assert torch.equal(value_of(recorded), tensor)


def test_the_refusal_is_of_the_family_and_says_what_to_do() -> None:
    with pytest.raises(LeanLoadError, match=r"aten\.add_\.Tensor.*Load the model first"):
        promise(2).add_(1)


def test_numbers_are_evaluated() -> None:
    tensor = torch.tensor([[1.5, -2.0], [0.25, 8.0]])
    recorded = Promise.of(MemorySource(tensor))
    assert recorded[1, 1].item() == 8.0
    assert float(recorded.sum()) == tensor.sum().item()
    assert int((recorded * 4)[1, 0]) == 1
    assert bool((recorded > 0).any())
    assert not bool((recorded > 0).all())


def test_control_flow_that_depends_on_values() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if (x.mean() > 0).item() else x - 1

    for sign in (1, -1):
        tensor = sign * torch.ones(3)
        assert_same(value_of(program(Promise.of(MemorySource(tensor)))), program(tensor))


@pytest.mark.parametrize(
    "look",
    [
        lambda p: p.numpy(),
        lambda p: p.tolist(),
        lambda p: p.__array__(),
        lambda p: torch.equal(p, p),
        lambda p: torch.allclose(p, p),
        lambda p: p.nonzero(),
        lambda p: p[p > 0],
        lambda p: torch.masked_select(p, p > 0),
        lambda p: torch.unique(p),
        lambda p: bool(p),
    ],
)
def test_what_needs_all_values_never_guesses(look: Any) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, LeanLoadError)) as caught:
        look(promise(4, 6))
    assert str(caught.value)


@pytest.mark.parametrize(
    "draw",
    [
        torch.rand_like,
        torch.randn_like,
        torch.bernoulli,
        torch.normal,
        torch.nn.functional.dropout,
        lambda p: torch.multinomial(p.abs(), 1),
    ],
)
def test_random_numbers_are_refused(draw: Any) -> None:
    """Drawn later and perhaps twice, they would be other numbers than those drawn now."""
    with pytest.raises(RecordingError):
        draw(promise(4, 6))


def test_a_real_operand_that_changes_later_is_noticed() -> None:
    """Recorded operands are read later: one written to since is an error, or was copied."""
    bias = torch.zeros(6)
    recorded = promise(4, 6) + bias
    expected = value_of(promise(4, 6))
    bias.fill_(5)
    try:
        actual = value_of(recorded)
    except RecordingError:
        return
    assert_same(actual, expected)


def test_a_constant_made_with_the_promises_device() -> None:
    recorded = promise(4, 6)
    zeros = torch.zeros(6, dtype=recorded.dtype, device=recorded.device)
    assert not isinstance(zeros, Promise)
    assert_same(value_of(recorded + zeros), value_of(recorded) + 0)


def test_a_move_to_its_own_device_keeps_the_recipe() -> None:
    recorded = promise(4, 6)
    moved = recorded.to("cpu").to(recorded.device).cpu()
    assert isinstance(moved, Promise)
    assert moved.node is recorded.node or isinstance(moved.node, SourceView)


def test_views_and_casts_of_a_source_stay_one_step() -> None:
    node = promise(4, 6).reshape(2, 2, 6)[1].T.to(torch.bfloat16).node  # type: ignore[attr-defined]
    assert isinstance(node, SourceView)
    assert node.casts == (torch.bfloat16,)
    assert shape_of(node) == (6, 2)
    assert dtype_of(node) == torch.bfloat16


@pytest.mark.parametrize(
    ("stored", "through", "casts"),
    [
        (torch.bfloat16, torch.float32, ()),
        (torch.float16, torch.float64, ()),
        (torch.float32, torch.float64, ()),
        (torch.float32, torch.bfloat16, (torch.bfloat16, torch.float32)),
        (torch.float16, torch.bfloat16, (torch.bfloat16, torch.float16)),
        (torch.float32, torch.float32, ()),
    ],
)
def test_only_casts_that_keep_every_value_cancel(stored: Any, through: Any, casts: Any) -> None:
    tensor = torch.tensor([1 / 3, 1e-7, 3e4, -0.0]).to(stored)
    recorded = Promise.of(MemorySource(tensor)).to(through).to(stored)
    assert recorded.node.casts == casts  # type: ignore[attr-defined]
    assert_same(value_of(recorded), tensor.to(through).to(stored))


def test_three_casts() -> None:
    for first in DTYPES:
        for second in DTYPES:
            for third in DTYPES:
                tensor = torch.tensor([1 / 3, 1e-7, 7e4, 1e30, -0.0, 65519.9])
                recorded = Promise.of(MemorySource(tensor)).to(first).to(second).to(third)
                assert_same(value_of(recorded), tensor.to(first).to(second).to(third))


def test_a_copy_of_a_step_is_that_step() -> None:
    made: Any = promise(4, 6, dtype=torch.bfloat16).T.contiguous()
    assert made.clone().node is made.node
    assert made.float().clone().to(torch.bfloat16).node is made.node  # as wide, and back
    assert (made.float() * 3).to(torch.bfloat16).node.func is aten._to_copy.default
    # Other values, another order of memory, or a part of what would not be freed.
    assert made.to(torch.float16).to(torch.bfloat16).node.func is aten._to_copy.default
    assert made.T.clone(memory_format=torch.contiguous_format).node is not made.T.node
    assert (made * 2)[1:3].clone().node.func is aten.clone.default


def test_one_expert_of_a_stack_does_not_read_the_others() -> None:
    experts = [Counting(torch.full((2, 3), float(i))) for i in range(4)]
    stacked = torch.stack([Promise.of(source) for source in experts])
    assert_same(value_of(stacked[2]), torch.full((2, 3), 2.0))
    assert [source.reads for source in experts] == [0, 0, 1, 0]


def test_one_half_of_joined_experts_does_not_read_the_others() -> None:
    parts = [Counting(torch.full((2, 3, 4), float(i))) for i in range(2)]
    joined = torch.cat([Promise.of(source) for source in parts], 1)
    assert_same(value_of(joined[1, 3:]), torch.full((3, 4), 1.0))
    assert [source.reads for source in parts] == [0, 1]


def test_several_results_are_picks_of_one_call() -> None:
    first, second = (promise(4, 6) * 2).split(2)
    assert isinstance(first.node, Pick)  # type: ignore[attr-defined]
    assert first.node.call is second.node.call  # type: ignore[attr-defined]
    values, order = promise(4, 6).sort()
    expected = value_of(promise(4, 6)).sort()
    assert_same(value_of(values), expected.values)
    assert_same(value_of(order), expected.indices)


def test_a_real_tensor_is_its_own_recipe_in_memory_of_its_own() -> None:
    tensor = torch.randn(3, 4).T
    node = node_of(tensor)
    assert isinstance(node, SourceView)
    value = value_of(tensor)
    assert_same(value, tensor)
    assert value.data_ptr() != tensor.data_ptr()


def test_a_view_of_the_callers_storage_keeps_its_offset() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    part = whole[1:, 2:]
    assert_same(value_of(Promise.of(MemorySource(part)).T[1]), part.T[1])


def test_dense_strides_keep_the_memory_order() -> None:
    geometry = torch.empty(4, 6, 8, device="meta").permute(2, 0, 1)
    assert dense_strides(geometry) == geometry.stride()
    assert dense_strides(geometry[:, ::2]) == (1, 48, 8)


def test_it_says_what_it_is() -> None:
    assert repr(promise(4, 6) * 2) == "Promise(shape=(4, 6), dtype=torch.float32, node=Call)"
    assert isinstance((promise(4, 6) * 2).node, Call)  # type: ignore[attr-defined]


def test_a_frozen_source_is_not_changed_by_evaluation() -> None:
    tensor = torch.randn(4, 6)
    before = tensor.clone()
    recorded = Promise.of(MemorySource(tensor))
    value = value_of((recorded.T + 1) * 2 - recorded.T.mean())
    value.zero_()
    assert torch.equal(tensor, before)
