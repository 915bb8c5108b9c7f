"""A model that comes from a processed copy, in the hands of the other features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

from tests.loading.test_load_weights_hf import tuned
from tests.support import quantized_zoo
from tests.support.comparison import changed, differences, lean_model, values
from tests.support.lightning_modules import sae_class
from tl_fastload import LeanHookedTransformer, load_weights_, save_lean
from tl_fastload.embedded_model import embedded_model_path
from tl_fastload.errors import DifferentModelError, MissingWeightsError, QuantizationError
from tl_fastload.lightning.record import differences as frozen_differences
from tl_fastload.lightning.record import record_of

RAW = dict.fromkeys(
    ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
)


def filled(model: Any) -> Any:
    """The model with other values."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    return model


def copied(model: Any, tmp_path: Path, **flags: Any) -> Any:
    return lean_model(save_lean(model, tmp_path / "copy"), **flags)


@pytest.mark.parametrize("mmap", ["auto", False])
@pytest.mark.parametrize("flags", [{}, RAW], ids=["processed", "raw"])
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa1-tied", "mixtral"])
def test_weights_from_a_copy(case_id: str, flags: Any, mmap: Any, zoo: Any, tmp_path: Path) -> None:
    expected = lean_model(zoo(case_id), **flags)
    folder = save_lean(expected, tmp_path / "copy", max_shard_bytes=10_000)
    model = filled(lean_model(zoo(case_id), mmap=mmap, **flags))
    identities = {name: (id(p), p.stride()) for name, p in model.named_parameters()}
    report = load_weights_(model, folder)
    assert differences(expected, model) == []
    assert {name: (id(p), p.stride()) for name, p in model.named_parameters()} == identities
    assert report.processing == expected.load_report.processing
    model.process_weights_()
    if not flags:
        assert "nothing was done" in model.load_report.notes[-1]
        assert differences(expected, model) == []


def test_weights_from_a_copy_of_another_dtype(tmp_path: Path) -> None:
    expected = lean_model(embedded_model_path(), dtype="bfloat16")
    save_lean(expected, tmp_path / "copy")
    model = lean_model(embedded_model_path())
    load_weights_(model, tmp_path / "copy" / "tl_fastload.json")
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter.float(), model.get_parameter(name))


@pytest.mark.parametrize("kind", ["int8", "nf4-double"])
def test_quantized_weights_from_a_copy(kind: str, zoo: Any, tmp_path: Path) -> None:
    folder = quantized_zoo.build(zoo, "llama-gqa")
    expected = lean_model(folder, quantize=quantized_zoo.config(kind))
    save_lean(expected, tmp_path / "copy")
    model = lean_model(folder, quantize=quantized_zoo.config(kind))
    tokens = torch.arange(3, 9)[None]
    wanted = expected(tokens)
    with torch.no_grad():
        model.embed.W_E.fill_(3.0)
        model.blocks[0].attn.W_Q.content.tensors().popitem()[1].zero_()
    load_weights_(model, tmp_path / "copy")
    assert torch.equal(model(tokens), wanted)
    with pytest.raises(QuantizationError, match="dense"):
        load_weights_(model, save_lean(lean_model(folder), tmp_path / "dense"))


def test_a_copy_that_does_not_fit_the_model(tmp_path: Path) -> None:
    save_lean(lean_model(embedded_model_path(), first_n_layers=1), tmp_path / "copy")
    model = lean_model(embedded_model_path())
    before = values(model)
    with pytest.raises(MissingWeightsError, match=r"missing: blocks\.1"):
        load_weights_(model, tmp_path / "copy")
    assert not changed(before, model)
    report = load_weights_(filled(model), tmp_path / "copy", strict=False)
    assert report.processing == {}


@pytest.mark.parametrize("flags", [{}, RAW], ids=["processed", "raw"])
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa1-tied", "santacoder", "gemma3"])
def test_hugging_faces_weights_into_a_copy(
    case_id: str, flags: Any, zoo: Any, tmp_path: Path
) -> None:
    folder = zoo(case_id)
    hf = tuned(case_id, folder)
    expected = lean_model(folder, hf_model=hf, **flags)
    model = copied(lean_model(folder, **flags), tmp_path, **flags)
    load_weights_(model, hf.state_dict())
    assert differences(expected, model) == []
    again = copied(model, tmp_path / "second", **flags)
    assert again._hf_config.to_dict() == model._hf_config.to_dict()


def test_processing_a_copy_is_no_step_twice(tmp_path: Path) -> None:
    model = copied(lean_model(embedded_model_path()), tmp_path)
    before = values(model)
    model.process_weights_()
    assert not changed(before, model)
    assert "nothing was done" in model.load_report.notes[-1]


def test_the_report_has_phases_and_steps(tmp_path: Path) -> None:
    report = copied(lean_model(embedded_model_path()), tmp_path).load_report
    assert [phase.name for phase in report.timeline.phases] == ["placing"]
    assert report.timeline.seconds
    report.plot()


def test_saving_sees_through_wrappers_in_any_order(tmp_path: Path) -> None:
    model = lean_model(embedded_model_path())
    compiled: Any = torch.compile(torch.nn.DataParallel(model))
    assert differences(model, copied(compiled, tmp_path)) == []


@pytest.mark.parametrize("arguments", [{}, {"quantize": "8bit"}], ids=str)
def test_a_copy_is_the_same_model_for_lightning(arguments: Any, tmp_path: Path) -> None:
    original = lean_model(embedded_model_path(), **arguments)
    copy = copied(original, tmp_path)
    assert frozen_differences(record_of({"lens": original}), {"lens": copy}) == []
    assert frozen_differences(record_of({"lens": copy}), {"lens": original}) == []
    model_class = sae_class("lightning.pytorch")
    checkpoint: dict[str, Any] = {"state_dict": {}}
    model_class(original).on_save_checkpoint(checkpoint)
    model_class(copy).on_load_checkpoint(checkpoint)
    with torch.no_grad():
        copy.embed.W_E.mul_(1.5)
    with pytest.raises(DifferentModelError, match=r"embed\.W_E"):
        model_class(copy).on_load_checkpoint(checkpoint)


def test_copying_is_a_strategy_for_quantize_free_copies(tmp_path: Path) -> None:
    model = lean_model(embedded_model_path())
    copy = LeanHookedTransformer.from_pretrained_lean(
        save_lean(model, tmp_path / "copy"), device="cpu", strategy="copy"
    )
    assert differences(model, copy) == []
    assert (copy.load_report.strategy, copy.load_report.mapped_bytes) == ("copy", 0)
