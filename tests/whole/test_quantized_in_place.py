"""Processing a quantized model in place: as if it had been loaded with these steps."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from tests.support import quantized_packed as packed
from tests.support import quantized_zoo as qz
from tests.support import reference
from tests.support.comparison import lean_model
from tl_fastload.errors import ArgumentError, MissingWeightsError
from tl_fastload.quantized import QuantizedTensor

CASES = ["gpt2", "llama-gqa", "neox", "qwen2", "gemma2", "phi", "bloom"]


def _unprocessed(zoo: Any, case_id: str, kind: str) -> tuple[Any, Any]:
    folder = qz.build(zoo, case_id)
    return qz.load(folder, kind, **reference.NO_PROCESSING), qz.load(folder, kind)


def _assert_equal(model: Any, expected: Any) -> None:
    """The same parameters: bytes and flags bit for bit, means and sums within rounding."""
    found, wanted = dict(model.named_parameters()), dict(expected.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert type(found[name].data) is type(parameter.data), name
        if not isinstance(parameter, QuantizedTensor):
            torch.testing.assert_close(found[name], parameter, rtol=1e-6, atol=1e-6)
            continue
        mine, theirs = found[name].content, parameter.content
        assert mine.parts()[1] == theirs.parts()[1], name
        assert mine.tensors().keys() == theirs.tensors().keys(), name
        for part, tensor in theirs.tensors().items():
            if part in ("in_shift", "out_shift"):
                torch.testing.assert_close(mine.tensors()[part], tensor, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(mine.tensors()[part], tensor), (name, part)


PACKED = [
    ("neox", "fp8-ends"),
    ("llama-gqa", "ct-int-groups"),
    ("gpt-oss", "mxfp4"),
    ("gpt2", "gptq"),
    ("neox", "awq"),
    ("bloom", "packed-zeros"),
    ("qwen2", "torchao-groups"),
    ("qwen2", "gguf"),
]


@pytest.mark.parametrize(
    ("case_id", "kind"), [*itertools.product(CASES, ("int8", "nf4-double")), *PACKED]
)
def test_processing_in_place_is_loading_with_processing(case_id: str, kind: str, zoo: Any) -> None:
    model, expected = _unprocessed(zoo, case_id, kind)
    before = dict(model.named_parameters())
    weights = qz.quantized_parameters(model)
    addresses = {n: _address(w) for n, w in weights.items()}
    model.process_weights_()
    _assert_equal(model, expected)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert {n: _address(w) for n, w in qz.quantized_parameters(model).items()} == addresses
    assert qz.gap(qz.log_probs(model, case_id), qz.log_probs(expected, case_id)) < 1e-4
    is_packed = kind in packed.PACKINGS
    named = packed.kind_of(kind) if is_packed else kind.split("-")[0]
    assert model.load_report.quantization == f"{named}, as in the model"
    model.process_weights_()
    assert any("nothing was done" in note for note in model.load_report.notes)
    _assert_equal(model, expected)


def _address(weight: QuantizedTensor) -> int:
    return next(iter(weight.content.stored.tensors().values())).data_ptr()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize(
    "first", [{"fold_ln": True}, {"fold_value_biases": True}, {"center_writing_weights": True}]
)
def test_steps_one_after_the_other(first: dict[str, bool], kind: str, zoo: Any) -> None:
    folder = qz.build(zoo, "gpt2")
    hf = qz.hf_model(folder, kind)
    model = lean_model(folder, hf_model=hf, **{**reference.NO_PROCESSING, **first})
    model.process_weights_()
    assert qz.gap(qz.log_probs(model, "gpt2"), qz.hf_log_probs(folder, kind, "gpt2")) < 1e-4
    values = qz.dense_values(lean_model(folder, hf_model=hf))
    for name, value in qz.dense_values(model).items():
        torch.testing.assert_close(value, values[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp8"])
def test_a_quantized_state_dict(kind: str, zoo: Any) -> None:
    """Another model's state dict, processed on the way; the two share no memory afterwards."""
    source, expected = _unprocessed(zoo, "gpt2", kind)
    model = copy.deepcopy(source)
    state_dict = source.state_dict()
    before = {name: copy.deepcopy(value) for name, value in state_dict.items()}
    model.load_and_process_state_dict(state_dict)
    _assert_equal(model, expected)
    theirs = {_address(weight) for weight in qz.quantized_parameters(source).values()}
    assert not theirs & {_address(weight) for weight in qz.quantized_parameters(model).values()}
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())


def test_a_quantized_state_dict_into_an_ordinary_model(zoo: Any) -> None:
    source, _ = _unprocessed(zoo, "gpt2", "int8")
    folder = qz.build(zoo, "gpt2")
    model = lean_model(folder, **reference.NO_PROCESSING)
    model.load_and_process_state_dict(source.state_dict())
    expected = lean_model(qz.dense_folder("gpt2", folder, "int8"))
    assert not qz.quantized_parameters(model)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_done_in_place(zoo: Any) -> None:
    model, _ = _unprocessed(zoo, "gpt2", "int8")
    folder = qz.build(zoo, "gpt2")
    before = copy.deepcopy(model)
    with pytest.raises(ArgumentError, match="refactor_factored_attn_matrices=True mixes"):
        model.process_weights_(refactor_factored_attn_matrices=True)
    dense = lean_model(folder, **reference.NO_PROCESSING).state_dict()
    with pytest.raises(ArgumentError, match=r"blocks.0.attn.W_K.* are quantized, the state dict's"):
        model.load_and_process_state_dict(dense)
    _assert_equal(model, before)
    assert model.cfg.normalization_type == "LN"


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_processed_state_dict_is_not_folded_again(kind: str, zoo: Any) -> None:
    """Its matrices are centred over their input, which scaling them would undo."""
    model, processed = _unprocessed(zoo, "gpt2", kind)
    with pytest.raises(MissingWeightsError, match="norms are folded away"):
        model.load_and_process_state_dict(processed.state_dict())
    with torch.no_grad():  # norms as a new model has them
        for name, parameter in model.named_parameters():
            if ".ln" in name or "ln_final" in name:
                parameter.fill_(1 if name.endswith(".w") else 0)
    before = copy.deepcopy(model)
    with pytest.raises(
        ArgumentError, match=r"W_\w+ cannot be processed in place: .*scale it first"
    ):
        model.load_and_process_state_dict(processed.state_dict())
    _assert_equal(model, before)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert model.cfg.normalization_type == "LN"
    assert torch.equal(qz.log_probs(model, "gpt2"), qz.log_probs(before, "gpt2"))
