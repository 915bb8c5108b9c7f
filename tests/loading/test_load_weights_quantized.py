"""`load_weights_` where weights are quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import quantized_zoo
from tests.support.comparison import lean_model
from tl_fastload import MissingWeightsError, QuantizationError, load_weights_
from tl_fastload.quantized import QuantizedTensor

pytest.importorskip("bitsandbytes")
KINDS = ["int8", "nf4"]
CASE = "llama-gqa1-tied"


def dense(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: p.dequantize() if isinstance(p, QuantizedTensor) else p.detach().clone()
        for name, p in model.named_parameters()
    }


def assert_same(model: Any, expected: Any) -> None:
    found, wanted = dense(model), dense(expected)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def altered(folder: Path, kind: str, **flags: Any) -> Any:
    """A model with other weights, quantized while loading."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(1.25)
    config = quantized_zoo.config(kind)
    return lean_model(folder, hf_model=hf, quantize=config, **flags)


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_kind(kind: str, as_file: bool, zoo: Any, tmp_path: Path) -> None:
    folder = quantized_zoo.build(zoo, CASE)
    model = lean_model(folder, quantize=quantized_zoo.config(kind))
    source = altered(folder, kind)
    identities = {name: id(p) for name, p in model.named_parameters()}
    before = dense(model)
    if as_file:
        torch.save(source.state_dict(), tmp_path / "weights.pt")
        load_weights_(model, tmp_path / "weights.pt")
    else:
        load_weights_(model, source.state_dict())
    assert_same(model, source)
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    name = "blocks.0.attn.W_Q"
    assert not torch.equal(before[name], dense(model)[name])
    assert model.load_report.quantization == kind
    ours = model.blocks[0].attn.W_Q.content.tensors().values()
    theirs = source.blocks[0].attn.W_Q.content.tensors().values()
    assert not {t.data_ptr() for t in ours} & {t.data_ptr() for t in theirs}
    assert torch.equal(model(torch.arange(5)[None]), source(torch.arange(5)[None]))


def test_other_kinds_and_dense_weights_are_refused(zoo: Any) -> None:
    folder = quantized_zoo.build(zoo, CASE)
    model = lean_model(folder, quantize=quantized_zoo.config("int8"))
    before = dense(model)
    for source in (lean_model(folder), lean_model(folder, quantize=quantized_zoo.config("nf4"))):
        with pytest.raises(QuantizationError, match=r"W_\w+ is quantized \(int8\)"):
            load_weights_(model, source.state_dict())
        with pytest.raises(QuantizationError, match="the model is as it was"):
            load_weights_(model, source.state_dict(), strict=False)
    with pytest.raises(QuantizationError, match="weights for it are dense"):
        load_weights_(model, folder)
    assert all(torch.equal(value, dense(model)[name]) for name, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights_for_a_dense_model(kind: str, zoo: Any) -> None:
    folder = quantized_zoo.build(zoo, CASE)
    model, source = lean_model(folder), altered(folder, kind)
    load_weights_(model, source.state_dict())
    assert_same(model, source)


@pytest.mark.parametrize("processed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case_id", [CASE, "gpt2"])
def test_a_quantized_checkpoint_of_hugging_face(
    case_id: str, kind: str, processed: bool, zoo: Any
) -> None:
    folder = quantized_zoo.saved(quantized_zoo.build(zoo, case_id), kind)
    steps = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    flags = dict.fromkeys(steps, processed)
    model, expected = lean_model(folder, **flags), lean_model(folder, **flags)
    for parameter in model.parameters():
        if not isinstance(parameter, QuantizedTensor):
            parameter.data.zero_()
    if not processed:
        load_weights_(model, altered(quantized_zoo.build(zoo, case_id), kind, **flags))
        assert not torch.equal(
            dense(model)["blocks.0.attn.W_Q"], dense(expected)["blocks.0.attn.W_Q"]
        )
    load_weights_(model, folder)
    assert_same(model, expected)
    # Its values, processed, for a model that is not quantized.
    plain = lean_model(quantized_zoo.build(zoo, case_id), **flags)
    load_weights_(plain, folder)
    assert_same(plain, expected)


def test_half_a_quantized_checkpoint(zoo: Any) -> None:
    folder = quantized_zoo.saved(quantized_zoo.build(zoo, CASE), "int8")
    model = lean_model(folder)
    before = dense(model)
    state = quantized_zoo.hf_model(quantized_zoo.build(zoo, CASE), "int8").state_dict()
    del state["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises((MissingWeightsError, QuantizationError)):
        load_weights_(model, state)
    assert all(torch.equal(value, dense(model)[name]) for name, value in before.items())
