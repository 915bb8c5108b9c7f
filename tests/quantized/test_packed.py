"""Formats that are only read: bytes stay bytes, with the numbers of what they stand for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_fastload
from tests.support import quantized_packed as packed
from tests.support import quantized_zoo as qz
from tests.support import reference
from tests.support.comparison import lean_model
from tl_fastload.errors import NumbersWarning

every_packing = pytest.mark.parametrize("name", packed.PACKINGS)


def case_of(name: str) -> str:
    return "gpt-oss" if packed.PACKINGS[name].stacked else "llama-gqa"


def _is_mapped(address: int, file: Path) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(edge, 16) for edge in line.split()[0].split("-"))
        if low <= address < high:
            return line.endswith(str(file))
    return False


@every_packing
def test_bytes_stay_bytes_with_the_numbers_of_their_values(name: str, zoo: Any) -> None:
    case_id = case_of(name)
    folder = qz.build(zoo, case_id)
    file = qz.saved(folder, name) / "model.safetensors"
    expected = qz.hf_log_probs(folder, name, case_id)
    for flags in ({}, reference.NO_PROCESSING):
        model = qz.load(folder, name, **flags)
        plain = lean_model(qz.dense_folder(case_id, folder, name), **flags)
        assert qz.gap(qz.log_probs(model, case_id), expected) < 1e-4
        assert model.load_report.quantization == f"{packed.kind_of(name)}, as in the checkpoint"
        held = qz.quantized_parameters(model)
        per_layer = 9 if case_id == "gpt-oss" else 7
        assert len(held) == per_layer * model.cfg.n_layers
        for weight in held.values():
            stored = weight.content.stored
            assert weight.why_dense() is None
            codes = next(iter(stored.tensors().values()))
            assert _is_mapped(codes.data_ptr(), file)
        if flags:
            for key, value in plain.named_parameters():
                found = model.get_parameter(key)
                found = found.dequantize() if key in held else found
                assert torch.equal(found, value), key
        assert qz.gap(qz.log_probs(plain, case_id), qz.log_probs(model, case_id)) < 1e-4


@every_packing
@pytest.mark.parametrize("flags", [{}, reference.NO_PROCESSING], ids=["processed", "unprocessed"])
@pytest.mark.parametrize("mmap", ["auto", False])
def test_dequantized_on_the_way(
    name: str, flags: Any, mmap: Any, zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ordinary weights, bit for bit those of an ordinary checkpoint; transformers loads nothing."""
    case_id = case_of(name)
    folder = qz.build(zoo, case_id)
    expected = lean_model(qz.dense_folder(case_id, folder, name), **flags)
    source = qz.saved(folder, name)
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loads")
    )
    model = lean_model(source, dequantize=True, mmap=mmap, **flags)
    assert not qz.quantized_parameters(model)
    assert (model.load_report.quantization, model.load_report.not_quantized) == (None, {})
    assert model.cfg.quantization_method is None
    for key, value in expected.named_parameters():
        found = model.get_parameter(key)
        assert torch.equal(found, value), key
        assert found.stride() == value.stride(), key
        assert found.untyped_storage().nbytes() == found.numel() * 4, key


@every_packing
def test_what_the_runtime_rounds_besides_is_said_once(name: str, zoo: Any) -> None:
    source = qz.saved(qz.build(zoo, case_of(name)), name)
    for arguments in ({}, {"dequantize": True}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = lean_model(source, **arguments)
        said = [str(w.message) for w in caught if issubclass(w.category, NumbersWarning)]
        assert len(said) == (0 if name == "mxfp4" else 1)
        assert all("runtime that rounds activations" in text for text in said)
        assert [note for note in model.load_report.notes if "runtime" in note] == said
        assert all(Path(w.filename).name == "comparison.py" for w in caught if str(w.message) in said)


@every_packing
def test_a_plan_knows_the_bytes(name: str, zoo: Any) -> None:
    source = qz.saved(qz.build(zoo, case_of(name)), name)
    model, plan = lean_model(source), tl_fastload.plan(source, device="cpu")
    held = qz.quantized_parameters(model).values()
    assert plan.quantization == f"{packed.kind_of(name)}, as in the checkpoint"
    assert plan.parameter_bytes["quantized"] == sum(w.nbytes_stored() for w in held)
    dense = tl_fastload.plan(source, device="cpu", dequantize=True)
    assert dense.quantization is None
    assert dense.parameter_bytes.get("quantized", 0) == 0
