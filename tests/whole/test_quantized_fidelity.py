"""Quantized models make the numbers of transformers' quantized model, processed or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support import quantized_trace as trace
from tests.support import quantized_zoo as qz
from tests.support import reference
from tests.support import zoo as zoo_module
from tests.support.comparison import lean_model
from tl_fastload.quantized.formats.bitsandbytes_bytes import FourBitBytes, Int8Bytes

# An 8-bit kernel rounds activations: one that lies on the edge may go the other way.
BOUNDS = {"int8": 2e-3, "nf4": 1e-4, "fp4": 1e-4}
PROCESSING: dict[str, dict[str, bool]] = {"unprocessed": reference.NO_PROCESSING, "processed": {}}
# Not of numbers in half precision, whose rounding differs with the version.
everywhere = pytest.mark.parity
every_case = pytest.mark.parametrize("case_id", qz.CASES)
EVERY_KIND = [
    case_id
    if case_id in ("gpt2", "llama-gqa", "neox", "phi3-gqa", "bloom")
    else pytest.param(case_id, marks=pytest.mark.slow)
    for case_id in qz.CASES
]


Compare = Callable[[Any, str, Any], None]


@pytest.fixture
def assert_same(monkeypatch: pytest.MonkeyPatch) -> Compare:
    """`assert_same(model, case_id, hf)`: within the bounds, or apart by rounding, as is shown."""

    def compare(model: Any, case_id: str, hf: Any) -> None:
        tokens = zoo_module.tokens(case_id)
        with torch.no_grad():
            expected = reference.log_probs(hf(tokens).logits)
        stored = next(iter(qz.quantized_parameters(model).values())).content.stored
        apart = qz.gap(qz.log_probs(model, case_id), expected)
        if apart >= BOUNDS[stored.kind]:
            assert stored.kind == "int8", apart
            assert apart < 50 * BOUNDS["int8"]
            theirs = trace.kernel_inputs_of_hf(hf, tokens)
            ours = trace.kernel_inputs_of(model, tokens, monkeypatch)
            assert trace.parts_by_rounding(theirs, ours, stored.threshold), apart
            # And it is the cause: without the float noise in front of the kernels, no gap is left.
            same = trace.log_probs_on_their_inputs(model, tokens, theirs, monkeypatch)
            assert qz.gap(same, expected) < 1e-4

    return compare


@everywhere
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@every_case
def test_log_probs_of_every_architecture(
    case_id: str, kind: str, zoo: Any, assert_same: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = qz.build(zoo, case_id)
    hf = qz.hf_model(folder, kind)
    for flags in PROCESSING.values():
        model = lean_model(folder, hf_model=hf, **flags)
        assert_same(model, case_id, hf)
        weights = qz.quantized_parameters(model)
        n_projections = 4 if case_id in qz.EXPERTS else 6
        assert len(weights) >= model.cfg.n_layers * n_projections
        assert [name for name, weight in weights.items() if weight.why_dense()] == []
        with monkeypatch.context() as patch:  # every product runs on the kernel
            patch.delattr(Int8Bytes, "dense")
            patch.delattr(FourBitBytes, "dense")
            qz.log_probs(model, case_id)


@everywhere
@pytest.mark.parametrize("processing", PROCESSING)
@pytest.mark.parametrize("kind", ["int8-outliers", "nf4-double", "fp4"])
@pytest.mark.parametrize("case_id", EVERY_KIND)
def test_log_probs_of_every_kind(
    case_id: str, kind: str, processing: str, zoo: Any, assert_same: Compare
) -> None:
    folder = qz.build(zoo, case_id)
    hf = qz.hf_model(folder, kind)
    assert_same(lean_model(folder, hf_model=hf, **PROCESSING[processing]), case_id, hf)


@everywhere
def test_outliers_are_multiplied_apart(zoo: Any, assert_same: Compare) -> None:
    """Activations above the threshold take another road, which other thresholds do not take."""
    folder = qz.build(zoo, "llama-gqa")
    few = qz.hf_log_probs(folder, "int8", "llama-gqa")
    many = qz.hf_log_probs(folder, "int8-outliers", "llama-gqa")
    assert qz.gap(few, many) > 10 * BOUNDS["int8"]
    hf = qz.hf_model(folder, "int8", llm_int8_threshold=0.0)
    assert_same(lean_model(folder, hf_model=hf), "llama-gqa", hf)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-2), (torch.bfloat16, 0.4)])
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
def test_compute_dtypes(case_id: str, dtype: torch.dtype, bound: float, zoo: Any) -> None:
    folder = qz.build(zoo, case_id)
    hf = qz.hf_model(folder, "nf4", bnb_4bit_compute_dtype=dtype)
    expected = qz.hf_log_probs(folder, "nf4", case_id, bnb_4bit_compute_dtype=dtype)
    for flags in PROCESSING.values():
        model = lean_model(folder, hf_model=hf, **flags)
        weights = qz.quantized_parameters(model).values()
        assert {weight.content.compute_dtype for weight in weights} == {dtype}
        assert qz.gap(qz.log_probs(model, case_id), expected) < bound


@everywhere
@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-double"])
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa1-tied", "neox", "phi3", "mixtral"])
def test_saved_checkpoints(case_id: str, kind: str, zoo: Any) -> None:
    """The bytes on disk are the bytes in memory; only the place they come from differs."""
    folder = qz.build(zoo, case_id)
    from_memory = lean_model(folder, hf_model=qz.hf_model(folder, kind))
    from_disk = lean_model(qz.saved(folder, kind))
    expected, found = dict(from_memory.named_parameters()), dict(from_disk.named_parameters())
    assert found.keys() == expected.keys()
    assert qz.quantized_parameters(from_disk).keys() == qz.quantized_parameters(from_memory).keys()
    for name, weight in qz.quantized_parameters(from_disk).items():
        theirs = expected[name].content.tensors()
        for part, tensor in weight.content.tensors().items():
            assert torch.equal(tensor, theirs[part]), (name, part)
    tokens = zoo_module.tokens(case_id)
    with torch.no_grad():
        assert torch.equal(from_disk(tokens), from_memory(tokens))
    assert from_disk.load_report.not_quantized == from_memory.load_report.not_quantized


@everywhere
def test_saved_compute_dtype_and_threshold(zoo: Any) -> None:
    folder = qz.build(zoo, "llama-gqa")
    model = lean_model(qz.saved(folder, "int8-outliers"))
    assert {w.content.stored.threshold for w in qz.quantized_parameters(model).values()} == {1.5}
    model = lean_model(qz.saved(folder, "nf4"))
    dtypes = {w.content.compute_dtype for w in qz.quantized_parameters(model).values()}
    assert dtypes == {torch.float32}
