"""`load_weights_` in Hugging Face's naming: what a fresh load would make of the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support import reference
from tests.support import zoo as bed
from tests.support.allocations import Allocations
from tests.support.comparison import changed, lean_model, values
from tl_fastload import ArgumentError, MissingWeightsError, load_weights_

CASES = [case_id for case_id, case in bed.CASES.items() if case.kind != "pth"]
STEPS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
RAW = dict.fromkeys(STEPS, False)


def tuned(case_id: str, folder: Path) -> Any:
    """A transformers model of the case with other weights."""
    hf = reference.hf_model(case_id, folder)
    hf = hf or reference.raw_module(folder, torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    return hf


def assert_same(model: Any, expected: Any) -> None:
    wanted = expected.state_dict()
    wrong = [
        name
        for name, value in model.state_dict().items()
        if not torch.equal(value, wanted[name]) and name != "pos_embed.W_pos"
    ]
    assert not wrong
    if model.cfg.positional_embedding_type != "alibi" and "pos_embed.W_pos" in wanted:
        assert torch.equal(model.pos_embed.W_pos, wanted["pos_embed.W_pos"])


OFTEN = ("gpt2", "neox", "bloom", "llama-gqa1-tied", "mixtral", "gemma3")


@pytest.mark.parametrize("flags", [{}, RAW], ids=["processed", "raw"])
@pytest.mark.parametrize(
    "case_id",
    [pytest.param(c, marks=() if c in OFTEN else pytest.mark.slow) for c in CASES],
)
def test_every_architecture(case_id: str, flags: Any, zoo: Any) -> None:
    """A state dict of a model that was tuned, into one that was loaded before."""
    folder = zoo(case_id)
    if case_id == "gpt-oss" and not flags:
        flags = {"fold_value_biases": False}
    model, hf = lean_model(folder, **flags), tuned(case_id, folder)
    expected = lean_model(folder, hf_model=hf, **flags)
    identities = {name: (id(p), p.stride()) for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)  # biases that the architecture lacks have to come back as zeros
    report = load_weights_(model, hf.state_dict())
    assert_same(model, expected)
    assert {name: (id(p), p.stride()) for name, p in model.named_parameters()} == identities
    assert report.processing == expected.load_report.processing
    assert model._processed[0] == {step for step in STEPS if flags.get(step, not flags)} or flags


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("flags", [{}, RAW], ids=["processed", "raw"])
@pytest.mark.parametrize("options", [{}, {"shards": True}, {"bin": True}], ids=str)
def test_files_and_dtypes(options: Any, flags: Any, dtype: torch.dtype, zoo: Any) -> None:
    folder = zoo("llama-gqa", **options)
    model, expected = (lean_model(folder, dtype=dtype, **flags) for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    load_weights_(model, folder)
    assert_same(model, expected)


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa1-tied", "mixtral"])
def test_one_file_with_the_configuration_that_the_model_remembers(
    case_id: str, zoo: Any, tmp_path: Path
) -> None:
    folder = zoo(case_id)
    model, hf = lean_model(folder), tuned(case_id, folder)
    hf.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole/config.json").unlink()
    file = next((tmp_path / "whole").glob("*.safetensors"))
    load_weights_(model, file)
    assert_same(model, lean_model(folder, hf_model=hf))


@pytest.mark.parametrize("processed", [True, False])
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "neox", "mistral", "opt"])
def test_a_stock_model_and_a_configuration(case_id: str, processed: bool, zoo: Any) -> None:
    folder = zoo(case_id)
    flags = dict.fromkeys(STEPS, processed)
    stock, hf = (
        reference.stock_model(case_id, folder, device="cpu", **flags),
        tuned(case_id, folder),
    )
    before = values(stock)
    with pytest.raises(ArgumentError, match="pass config="):
        load_weights_(stock, hf.state_dict())
    assert not changed(before, stock)
    expected = lean_model(folder, hf_model=hf, **flags)
    for config in (hf.config, folder, str(folder)):
        load_weights_(stock, hf.state_dict(), config=config)
        for name, parameter in expected.named_parameters():
            assert torch.equal(stock.state_dict()[name], parameter), name
        stock.load_state_dict(before)
    load_weights_(stock, hf)  # the configuration is the model's own
    assert torch.equal(stock.W_Q, expected.W_Q)


def test_steps_can_be_chosen(zoo: Any) -> None:
    folder = zoo("gpt2")
    model = lean_model(folder)
    report = load_weights_(model, folder, processing={"center_unembed": False})
    expected = lean_model(folder, center_unembed=False)
    assert_same(model, expected)
    assert report.processing["center_unembed"] == "skipped: not asked for"
    load_weights_(model, folder, processing={"center_unembed": True})
    assert_same(model, lean_model(folder))
    with pytest.raises(ArgumentError, match="does not fit the model, whose norms are folded"):
        load_weights_(model, folder, processing={"fold_ln": False})
    with pytest.raises(ArgumentError, match="none of fold_ln"):
        load_weights_(model, folder, processing={"fold_norms": False})
    before = values(model)
    model.process_weights_()
    assert "nothing was done" in model.load_report.notes[-1]
    assert not changed(before, model)


def test_everything_wrong_is_told_at_once(zoo: Any) -> None:
    folder = zoo("llama-gqa")
    for flags in ({}, RAW):
        model = lean_model(folder, **flags)
        before, state = values(model), bed.read_weights(folder)
        del state["model.layers.1.mlp.up_proj.weight"]
        state["model.layers.0.mlp.down_proj.weight"] = torch.ones(3, 5)
        state["model.layers.0.self_attn.r_proj.weight"] = torch.ones(2)
        state["model.norm.weight"] = state["model.norm.weight"].to(torch.int32)
        with pytest.raises(MissingWeightsError) as error:
            load_weights_(model, state)
        for line in (
            "missing: model.layers.1.mlp.up_proj.weight",
            "misshapen: model.layers.0.mlp.down_proj.weight is (3, 5)",
            "unexpected: model.layers.0.self_attn.r_proj.weight",
            "not weights: model.norm.weight holds torch.int32",
        ):
            assert line in str(error.value), line
        assert not changed(before, model)
        with pytest.raises(MissingWeightsError, match="misshapen"):
            load_weights_(model, state, strict=False)
        assert not changed(before, model)


@pytest.mark.parametrize("flags", [{}, RAW], ids=["processed", "raw"])
def test_a_part_of_the_weights(flags: Any, zoo: Any) -> None:
    folder = zoo("gpt2")
    hf = tuned("gpt2", folder)
    model, expected = lean_model(folder, **flags), lean_model(folder, hf_model=hf, **flags)
    before = values(model)
    keys = ("transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.bias")
    part = {key: hf.state_dict()[key] for key in keys}
    report = load_weights_(model, {**part, "probe.weight": torch.ones(2)}, strict=False)
    assert sorted(changed(before, model)) == ["blocks.1.mlp.W_out", "blocks.1.mlp.b_out"]
    assert torch.equal(model.blocks[1].mlp.W_out, expected.blocks[1].mlp.W_out)
    assert report.unexpected_keys == ("probe.weight",)
    assert "transformer.h.0.ln_1.weight" in report.missing_keys


def test_a_part_that_processing_cannot_use(zoo: Any) -> None:
    """Folded norms: a projection alone does not say what becomes of it."""
    folder = zoo("gpt2")
    model, raw = lean_model(folder), lean_model(folder, **RAW)
    before = values(model)
    key = "transformer.h.1.attn.c_attn.weight"
    part = {key: tuned("gpt2", folder).state_dict()[key]}
    with pytest.raises(MissingWeightsError, match=r"several weights, of which .*ln_1"):
        load_weights_(model, part, strict=False)
    assert not changed(before, model)
    load_weights_(raw, part, strict=False)
    assert not torch.equal(raw.blocks[1].attn.W_K, lean_model(folder, **RAW).blocks[1].attn.W_K)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "trainer.lm."])
def test_prefixes(prefix: str, zoo: Any) -> None:
    folder = zoo("mixtral")
    model, hf = lean_model(folder), tuned("mixtral", folder)
    report = load_weights_(model, {prefix + n: v for n, v in hf.state_dict().items()})
    assert any(repr(prefix) in note for note in report.notes)
    assert_same(model, lean_model(folder, hf_model=hf))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("flags", [{}, RAW], ids=["processed", "raw"])
def test_no_second_copy(flags: Any, dtype: str, zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One parameter is held, in float32 where that is what TransformerLens processes it in."""
    from tl_fastload.loading import sources
    from tl_fastload.recipes import nodes
    from tl_fastload.source import reader

    monkeypatch.setattr(nodes, "PIECE_ELEMENTS", 256)

    monkeypatch.setattr(reader, "CHUNK_BYTES", 256)
    monkeypatch.setattr(reader, "HELD_SPAN_BYTES", 512)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 256)
    folder = zoo("llama-gqa", vocab_size=400)
    model, expected = (lean_model(folder, dtype=dtype, **flags) for _ in range(2))
    largest = max(p.numel() * 4 for p in model.parameters())
    total = sum(p.numel() * 4 for p in model.parameters())
    for source in (folder, bed.read_weights(folder)):
        with Allocations() as allocations:
            load_weights_(model, source)
        assert allocations.peak_bytes < 1.2 * largest
        assert_same(model, expected)
    assert 2 * largest < total


def test_values_that_overflow_are_told(zoo: Any) -> None:
    model = lean_model(zoo("llama-gqa"), dtype="float16")
    state = bed.read_weights(zoo("llama-gqa"))
    report = load_weights_(model, {**state, "lm_head.weight": state["lm_head.weight"] * 1e6})
    assert any("unembed.W_U" in note for note in report.notes)
    assert not any("embed.W_E" in note for note in report.notes)


def test_a_read_that_fails_changes_nothing(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_fastload import CheckpointError
    from tl_fastload.source import reader

    model = lean_model(zoo("gpt2"))
    before = values(model)
    read, calls = reader._read_at, []

    def fails(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > 20:
            raise OSError(5, "Input/output error")
        return read(*arguments)

    monkeypatch.setattr(reader, "_read_at", fails)
    with pytest.raises(CheckpointError, match="Input/output error"):
        load_weights_(model, zoo("gpt2"))
    assert not changed(before, model)


def test_fewer_layers_than_the_weights_have(zoo: Any) -> None:
    folder = zoo("llama-gqa")
    model = lean_model(folder, first_n_layers=2)
    expected = values(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    report = load_weights_(model, folder)
    assert not changed(expected, model)
    assert "The weights have 3 layers, the model 2" in report.notes[-1]


def test_another_model_altogether(zoo: Any, tmp_path: Path) -> None:
    model = lean_model(zoo("gpt2"))
    before = values(model)
    with pytest.raises(MissingWeightsError):
        load_weights_(model, zoo("llama-gqa"))
    save_file({"a.b": torch.ones(2)}, tmp_path / "odd.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"something": "else"}))
    with pytest.raises(MissingWeightsError, match=r"a\.b"):
        load_weights_(model, tmp_path)
    with pytest.raises(ArgumentError, match="neither a transformers configuration"):
        load_weights_(model, zoo("gpt2"), config=7)
    assert not changed(before, model)
