"""Evaluating recipes: bit for bit what running the operations gives, in less memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_devices import FIRST, FakeDevices, back
from tests.support.programs import (
    CPU,
    DTYPES,
    STEPS,
    AllocatedBytes,
    assert_same,
    in_file,
    in_memory,
    random_sources,
    run,
)
from tl_fastload.errors import RecordingError
from tl_fastload.ground.geometry import is_dense, same_layout
from tl_fastload.recipes import nodes
from tl_fastload.recipes.evaluate import Evaluation, Value, evaluate, operands, sources
from tl_fastload.recipes.nodes import MemorySource, SourceView
from tl_fastload.recipes.promise import Promise, node_of
from tl_fastload.recipes.spares import Spares
from tl_fastload.source.reader import FileReader

SHAPES = ((4, 6), (6,), (2, 3, 4), (4, 6))
KIB = 1 << 10
FEW = settings(max_examples=300)
some_dtypes = st.tuples(*[st.sampled_from(DTYPES)] * len(SHAPES))


def promises_of(tensors: list[torch.Tensor]) -> list[Promise]:
    return in_memory(tensors)


def value_of(promise: torch.Tensor) -> torch.Tensor:
    value: torch.Tensor = evaluate(node_of(promise), CPU).tensor
    return value


def taken(value: Value) -> torch.Tensor:
    """What the placer does with a result: keep what is one's own, copy what is not."""
    tensor: torch.Tensor = value.tensor
    size = tensor.numel() * tensor.element_size()
    if value.buffer.owned and tensor.untyped_storage().nbytes() == size:
        value.buffer.owned = False
        return tensor
    return tensor.clone()


def check_strides(actual: torch.Tensor, expected: torch.Tensor) -> None:
    if is_dense(expected):
        assert same_layout(expected.shape, actual.stride(), expected.stride())


@FEW
@given(program=STEPS, dtypes=some_dtypes, seed=st.integers(0, 9))
def test_a_program_gives_the_same_bits(program: Any, dtypes: Any, seed: int) -> None:
    tensors = random_sources(seed, dtypes, SHAPES)
    before = [tensor.clone() for tensor in tensors]
    expected = run(program, [tensor.clone() for tensor in tensors])
    recorded = run(program, promises_of(tensors))
    assert len(recorded) == len(expected)
    for promise, real in zip(recorded, expected, strict=True):
        actual = value_of(promise)
        assert_same(actual, real)
        check_strides(actual, real)
        assert promise.shape == real.shape
        assert promise.dtype == real.dtype
    for tensor, copy in zip(tensors, before, strict=True):
        assert_same(tensor, copy)


@settings(FEW, max_examples=150)
@given(program=STEPS, dtypes=some_dtypes, chunk=st.sampled_from([16, 64, 4 << 20]))
def test_a_program_on_a_file_gives_the_same_bits(program: Any, dtypes: Any, chunk: int) -> None:
    tensors = random_sources(1, dtypes, SHAPES)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_fastload.source.reader.CHUNK_BYTES", chunk)
        patch.setattr("tl_fastload.source.reader.HELD_SPAN_BYTES", chunk)
        reader = FileReader()
        path = Path(folder) / "model.safetensors"
        recorded = run(program, in_file(tensors, path, reader))
        before = path.read_bytes()
        for promise, real in zip(recorded, run(program, tensors), strict=True):
            assert_same(value_of(promise), real)
        reader.close()
        assert path.read_bytes() == before


@FEW
@given(program=STEPS, dtypes=some_dtypes, order=st.randoms(use_true_random=False))
def test_results_evaluated_together_are_the_same(program: Any, dtypes: Any, order: Any) -> None:
    tensors = random_sources(2, dtypes, SHAPES)
    nodes = [node_of(promise) for promise in run(program, promises_of(tensors))]
    expected = run(program, [tensor.clone() for tensor in tensors])
    pairs = list(zip(nodes, expected, strict=True))
    order.shuffle(pairs)
    evaluation = Evaluation([node for node, _ in pairs], CPU)
    results = [taken(evaluation.value(node)) for node, _ in pairs]
    # Only now: a later result must not have written into an earlier one.
    for result, (_, real) in zip(results, pairs, strict=True):
        assert_same(result, real)
    addresses = [t.untyped_storage().data_ptr() for t in [*results, *tensors] if t.numel()]
    assert len(set(addresses)) == len(addresses)
    assert not evaluation.kept  # nothing waits for a use that never comes


@FEW
@given(program=STEPS, dtypes=some_dtypes)
def test_values_in_memory_that_was_used_before_are_the_same(program: Any, dtypes: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_fastload.recipes.spares.LEAST_BYTES", 1)
        patch.setattr("tl_fastload.recipes.evaluate.LEAST_BYTES", 1)
        spares = Spares()
        spares.limit(1 << 20)
        for seed in range(2):
            tensors = random_sources(seed, dtypes, SHAPES)
            expected = run(program, [tensor.clone() for tensor in tensors])
            nodes = [node_of(promise) for promise in run(program, promises_of(tensors))]
            evaluation = Evaluation(nodes, CPU, spares)
            values = [evaluation.value(node) for node in nodes]
            for value, real in zip(values, expected, strict=True):
                assert_same(value.tensor, real)
                check_strides(value.tensor, real)
            for value in values:
                evaluation.let_go(value)


@FEW
@given(program=STEPS, dtypes=some_dtypes)
def test_no_more_memory_than_running_it(program: Any, dtypes: Any) -> None:
    tensors = random_sources(3, dtypes, SHAPES)
    with AllocatedBytes(tensors) as eager:
        expected = run(program, tensors)
    for promise, real in zip(run(program, promises_of(tensors)), expected, strict=True):
        with AllocatedBytes(tensors) as lean:
            evaluate(node_of(promise), CPU)
        assert lean.peak_bytes <= eager.peak_bytes + real.numel() * real.element_size()


ROWS, COLUMNS = 256, 512
SMALL_BYTES = 4 * (ROWS + COLUMNS) * 4  # a few vectors


def fold(w: torch.Tensor, ln: torch.Tensor) -> torch.Tensor:
    return w * ln[:, None]


def fold_and_center(w: torch.Tensor, ln: torch.Tensor) -> torch.Tensor:
    folded = w * ln[:, None]
    return folded - folded.mean(0, keepdim=True)


def upcast_fold_center_cast(w: torch.Tensor, ln: torch.Tensor) -> torch.Tensor:
    folded = w.float() * ln.float()[:, None]
    return (folded - folded.mean(-1, keepdim=True)).to(w.dtype)


def clone_fold_center(w: torch.Tensor, ln: torch.Tensor) -> torch.Tensor:
    return fold_and_center(w.clone(), ln.clone()).clone()


def heads(w: torch.Tensor, ln: torch.Tensor) -> torch.Tensor:
    split = w.T.reshape(8, COLUMNS // 8, ROWS).permute(0, 2, 1)
    folded = split * ln[None, :, None]
    return folded - folded.mean(1, keepdim=True)


@pytest.mark.parametrize("program", [fold, fold_and_center, clone_fold_center, heads])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_processing_needs_one_output(program: Any, where: str, tmp_path: Path) -> None:
    tensors = [torch.randn(ROWS, COLUMNS), torch.randn(ROWS)]
    reader = FileReader()
    path = tmp_path / "model.safetensors"
    recorded = program(
        *(in_memory(tensors) if where == "memory" else in_file(tensors, path, reader))
    )
    expected = program(*tensors)
    with AllocatedBytes(tensors) as bytes_:
        actual = value_of(recorded)
    assert_same(actual, expected)
    assert bytes_.peak_bytes <= expected.nbytes + SMALL_BYTES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_processing_in_half_precision(dtype: torch.dtype, where: str, tmp_path: Path) -> None:
    """The scratch is the one float32 copy; the result is half its size."""
    tensors = [torch.randn(ROWS, COLUMNS).to(dtype), torch.randn(ROWS).to(dtype)]
    reader = FileReader()
    path = tmp_path / "model.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_fastload.source.reader.CHUNK_BYTES", KIB)
        sources_ = in_memory(tensors) if where == "memory" else in_file(tensors, path, reader)
        recorded = upcast_fold_center_cast(*sources_)
        with AllocatedBytes(tensors) as bytes_:
            actual = value_of(recorded)
    assert_same(actual, upcast_fold_center_cast(*tensors))
    assert bytes_.peak_bytes <= 3 * actual.nbytes + SMALL_BYTES + KIB


def two_uses(x: torch.Tensor) -> torch.Tensor:
    """The parts are views of `doubled`, which is used once more before they are."""
    doubled = x * 2
    return (doubled + 1)[:2] * doubled.split(2)[0]


def unbound_then_changed(x: torch.Tensor) -> torch.Tensor:
    doubled = x * 2
    return (doubled + 1)[0] * doubled.unbind(0)[0]


def with_its_transpose(x: torch.Tensor) -> torch.Tensor:
    square = x[:, :4] * 2
    return (square + 1) * square.T


def with_itself(x: torch.Tensor) -> torch.Tensor:
    doubled = x + x
    return doubled * doubled - doubled


def slice_of_itself(x: torch.Tensor) -> torch.Tensor:
    doubled = x * 2
    return doubled - doubled[:1]


def select_of_transposed_stack(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x.T, x.T * 2])[0].reshape(-1)


def part_of_transposed_cat(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.T, x.T + 1])[:6].reshape(-1)


def stack_of_dtypes(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x.half(), x])[0] / 3


def cat_of_dtypes(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.half(), x])[:4] / 3


def cat_with_nothing(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.empty(0), x], 1)[:, :3]


def window_of_a_cast(x: torch.Tensor) -> torch.Tensor:
    return x[2:4].double().as_strided((3,), (1,), 0)


def window_of_a_clone(x: torch.Tensor) -> torch.Tensor:
    return x[2:4].clone().as_strided((3,), (1,), 0)


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)[1:] >> 2


def scaled_by_a_number(x: torch.Tensor) -> torch.Tensor:
    return x.half() * x[0, 0].double()


def diagonal(x: torch.Tensor) -> torch.Tensor:
    return x.half().diagonal() + x.unfold(1, 2, 3).sum()


@pytest.mark.parametrize(
    "program",
    [
        two_uses,
        unbound_then_changed,
        with_its_transpose,
        with_itself,
        slice_of_itself,
        select_of_transposed_stack,
        part_of_transposed_cat,
        stack_of_dtypes,
        cat_of_dtypes,
        cat_with_nothing,
        bytes_of,
        scaled_by_a_number,
        diagonal,
    ],
)
def test_awkward_programs(program: Any) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(4))
    assert_same(value_of(program(in_memory([x])[0])), program(x))


@pytest.mark.parametrize("program", [window_of_a_cast, window_of_a_clone])
def test_what_depends_on_memory_is_refused(program: Any) -> None:
    with pytest.raises(RecordingError, match="as_strided"):
        program(in_memory([torch.randn(4, 6)])[0])


@pytest.mark.parametrize("dim", [0, 1])
def test_the_mean_of_a_slice_of_a_cast(dim: int) -> None:
    """Rounding depends on strides: a slice must not have become dense on the way."""
    x = torch.randn(64, 1001, generator=torch.Generator().manual_seed(5))

    def program(w: torch.Tensor) -> torch.Tensor:
        return w.half().float()[:, ::3].T.mean(dim)

    assert_same(value_of(program(in_memory([x])[0])), program(x))


def test_an_expanded_cast_is_not_held_whole() -> None:
    x = torch.randn(KIB)
    recorded = in_memory([x])[0].double().expand(64, KIB) + torch.zeros(1, dtype=torch.float64)
    with AllocatedBytes([x]) as bytes_:
        actual = value_of(recorded)
    assert bytes_.peak_bytes <= actual.nbytes + 16 * KIB


def test_a_source_read_for_a_cast_is_not_kept_too() -> None:
    x = torch.randn(64, 64)
    part = in_memory([x])[0][:, ::2]
    evaluation = Evaluation([(part.double() * (part + 1)).node], CPU)  # type: ignore[attr-defined]
    evaluation.value(next(iter(evaluation.uses)))
    assert not evaluation.kept


def test_lent_memory_is_not_owned() -> None:
    x = torch.randn(3, 4)
    value = evaluate(in_memory([x])[0].T.node, CPU)
    assert not value.buffer.owned
    assert value.tensor.data_ptr() == x.data_ptr()


def test_a_result_is_owned_and_dense() -> None:
    x = torch.randn(3, 4)
    value = evaluate((in_memory([x])[0].T * 2).node, CPU)
    assert value.buffer.owned
    assert value.tensor.untyped_storage().nbytes() == x.nbytes


def test_a_long_recipe() -> None:
    """Longer than any processing makes one; evaluation recurses."""
    x = torch.ones(2)
    promise: torch.Tensor = in_memory([x])[0]
    for _ in range(100):
        promise = promise + 1
    assert value_of(promise).tolist() == [101.0, 101.0]


def test_sources_lists_each_once() -> None:
    a, b = in_memory([torch.ones(2), torch.ones(2)])
    found = sources((a * b + a).node)
    assert {view.source for view in found} == {a.node.source, b.node.source}
    assert len(found) == 2


def test_operands_look_into_lists() -> None:
    a, b = in_memory([torch.ones(2), torch.ones(2)])
    assert operands(torch.stack([a, b]).node) == [a.node, b.node]  # type: ignore[attr-defined]
    assert operands(a.node) == []


def test_a_node_is_needed() -> None:
    with pytest.raises(TypeError, match="not a recipe"):
        Evaluation([], CPU)._compute("nothing")  # type: ignore[arg-type]


def test_evaluation_needs_no_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    value = value_of(Promise.of(MemorySource(weight)) * 2)
    assert not value.requires_grad
    assert isinstance(Promise.of(MemorySource(weight)).node, SourceView)


@pytest.mark.parametrize("casts", [(torch.float32,), (torch.bfloat16, torch.float32)])
def test_memory_goes_to_a_device_as_it_is_and_is_cast_there(
    casts: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "PIECE_ELEMENTS", 64)
    monkeypatch.setattr(nodes, "_CASTING", ("lazy",))
    copy_, copied = torch.Tensor.copy_, []

    def spied(target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        copied.append((values.device.type, values.numel()))
        return copy_(target, values)

    monkeypatch.setattr(torch.Tensor, "copy_", spied)
    value = torch.randn(12, 32).half().T
    expected = value
    for dtype in casts:
        expected = expected.to(dtype)
    geometry = torch.empty(12, 32, dtype=value.dtype, device="meta").T
    with FakeDevices():
        out = torch.empty(32, 12, dtype=expected.dtype, device=FIRST)
        MemorySource(value).read_into(out, geometry, casts)
    assert_same(back(out), expected.contiguous())
    assert {device for device, _ in copied} == {"lazy"}
    assert max(count for _, count in copied) <= 64
