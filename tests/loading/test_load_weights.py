"""`load_weights_` in TransformerLens' naming: values, memory, what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tl_fastload
from tests.support.allocations import Allocations
from tests.support.comparison import changed, lean_model, values
from tests.support.written_weights import RAW, SOURCES, assert_holds, other_values, written
from tl_fastload import LeanHookedTransformer, load_weights_


@pytest.fixture
def model(zoo: Any) -> LeanHookedTransformer:
    return lean_model(zoo("gpt2"))


@pytest.mark.parametrize("how", SOURCES)
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa1-tied", "mixtral"])
def test_every_source(case_id: str, how: str, zoo: Any, tmp_path: Path) -> None:
    model = lean_model(zoo(case_id))
    state = other_values(model)
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    report = load_weights_(model, written(how, state, tmp_path))
    assert_holds(model, state)
    # Autograd and process_weights_ see that they have changed, also where bytes were read in.
    assert not [n for n, p in model.named_parameters() if p._version == versions[n] and p.numel()]
    assert model.load_report is report
    assert report.missing_keys == report.unexpected_keys == ()
    assert report.strategy == "copy"
    assert report.source == ("a state dict" if how == "state dict" else report.source)
    assert "NaN" not in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_everything_about_a_parameter_stays(
    dtype: torch.dtype, source_dtype: torch.dtype, zoo: Any, tmp_path: Path
) -> None:
    model = lean_model(zoo("llama-gqa"), dtype=dtype)
    model.blocks[0].attn.W_Q.requires_grad_(False)
    model.embed.W_E.grad = torch.ones_like(model.embed.W_E)
    tables = {name: value.clone() for name, value in model.named_buffers()}
    before = {
        name: (id(p), p.data_ptr(), p.dtype, p.device, p.stride(), p.requires_grad)
        for name, p in model.named_parameters()
    }
    assert any(not parameter.is_contiguous() for parameter in model.parameters())
    state = {
        name: value.to(source_dtype) if value.is_floating_point() else value
        for name, value in other_values(model).items()
    }
    for source in (state, written("safetensors file", state, tmp_path)):
        load_weights_(model, {name: value * 0 for name, value in state.items()})
        load_weights_(model, source)
        assert {
            name: (id(p), p.data_ptr(), p.dtype, p.device, p.stride(), p.requires_grad)
            for name, p in model.named_parameters()
        } == before
        weights = {name: state[name] for name, _ in model.named_parameters()}
        assert_holds(model, weights)
    assert torch.equal(model.embed.W_E.grad, torch.ones_like(model.embed.W_E))
    if source_dtype == torch.float16:  # too coarse for tables of angles: the model's own stay
        model = lean_model(zoo("llama-gqa"))
        load_weights_(model, state)
        tables = dict(lean_model(zoo("llama-gqa")).named_buffers())
        assert all(torch.equal(tables[name], value) for name, value in model.named_buffers())


def test_an_optimizer_goes_on(model: Any, zoo: Any) -> None:
    from tests.support import zoo as bed

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = other_values(model)
    load_weights_(model, state)
    before = values(model)
    model(bed.tokens("gpt2"), return_type="loss").backward()
    optimizer.step()
    assert "unembed.W_U" in changed(before, model)


@pytest.mark.parametrize("how", ["state dict", "safetensors file"])
def test_a_graph_of_before_is_not_used(how: str, model: Any, tmp_path: Path) -> None:
    """Autograd sees that weights it has saved are others now, also when bytes were read in."""
    from tests.support import zoo as bed

    loss = model(bed.tokens("gpt2"), return_type="loss")
    load_weights_(model, written(how, other_values(model), tmp_path))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("how", SOURCES)
def test_a_part_of_the_weights(how: str, model: Any, tmp_path: Path) -> None:
    before, state = values(model), other_values(model)
    part = {name: state[name] for name in ("blocks.1.mlp.W_in", "blocks.0.attn.b_Q")}
    source = written(how, {**part, "probe.weight": torch.ones(2)}, tmp_path)
    report = load_weights_(model, source, strict=False)
    assert sorted(changed(before, model)) == sorted(part)
    assert_holds(model, part)
    assert report.unexpected_keys == ("probe.weight",)
    assert "blocks.0.mlp.W_in" in report.missing_keys
    assert not any("mask" in name or "IGNORE" in name for name in report.missing_keys)
    assert "1: probe.weight" in str(report)


def test_a_model_that_was_made_without_weights(model: Any) -> None:
    empty = LeanHookedTransformer(model.cfg)
    report = load_weights_(empty, model)
    assert empty.load_report is report
    assert_holds(empty, model.state_dict())


def test_tables_may_be_absent_odd_or_of_another_version(model: Any) -> None:
    before = {name: value.clone() for name, value in model.named_buffers()}
    state = {name: other_values(model)[name] for name, _ in model.named_parameters()}
    load_weights_(model, state)
    odd = {
        **state,
        "blocks.0.attn.mask": torch.ones(2, 2, dtype=torch.bool),
        "blocks.0.attn.rotary_sin": torch.ones(3),
    }
    report = load_weights_(model, odd)
    assert any("own table stays" in note for note in report.notes)
    assert_holds(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_a_model_as_the_source(model: Any, zoo: Any) -> None:
    source = lean_model(zoo("gpt2"))
    load_weights_(source, other_values(source))
    load_weights_(model, torch.compile(source, backend="eager"))
    assert_holds(model, source.state_dict())
    with torch.no_grad():
        source.embed.W_E.zero_()
    assert model.embed.W_E.any()


def test_its_own_state_dict(model: Any) -> None:
    before = values(model)
    versions = [parameter._version for parameter in model.parameters()]
    load_weights_(model, model.state_dict())
    assert not changed(before, model)
    assert versions == [parameter._version for parameter in model.parameters()]


@pytest.mark.parametrize("mmap", [True, False])
def test_layers_that_change_places(mmap: bool, zoo: Any) -> None:
    model = lean_model(zoo("llama-gqa"), mmap=mmap, **RAW)
    before = values(model)
    layers = {"blocks.0.": "blocks.2.", "blocks.1.": "blocks.0.", "blocks.2.": "blocks.1."}
    state = {layers.get(n[:9], n[:9]) + n[9:]: v for n, v in model.state_dict().items()}
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    with Allocations() as allocations:
        load_weights_(model, state)
    assert 0 < allocations.peak_bytes <= largest
    assert_holds(model, {layers.get(n[:9], n[:9]) + n[9:]: v for n, v in before.items()})


def test_transposed_views_of_itself(zoo: Any) -> None:
    model = lean_model(zoo("gpt2"), **RAW)
    square = model.blocks[0].attn.W_Q[0]
    state = dict(model.state_dict())
    w_q = state["blocks.0.attn.W_Q"]
    size = min(square.shape)
    turned = w_q.as_strided(w_q.shape, w_q.stride(), w_q.storage_offset()).flip(0)
    view = w_q.detach()[:, :size].transpose(1, 2) if square.shape[0] == square.shape[1] else turned
    expected = view.clone()
    load_weights_(model, {"blocks.0.attn.W_Q": view}, strict=False)
    assert torch.equal(model.blocks[0].attn.W_Q, expected)


@pytest.mark.parametrize("how", ["state dict", "bfloat16", "safetensors file", "shards"])
def test_no_second_copy(how: str, zoo: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from tl_fastload.source import reader

    monkeypatch.setattr(reader, "CHUNK_BYTES", 256)
    monkeypatch.setattr(reader, "HELD_SPAN_BYTES", 512)
    monkeypatch.setattr(tl_fastload.loading.sources, "CHUNK_BYTES", 256)
    model = lean_model(zoo("gpt2"))
    state = other_values(model)
    if how == "bfloat16":
        state = {n: v.bfloat16() if v.is_floating_point() else v for n, v in state.items()}
    source = written("state dict" if how == "bfloat16" else how, state, tmp_path)
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    assert largest * 4 < total
    with Allocations() as allocations:
        load_weights_(model, source)
    assert allocations.peak_bytes <= largest + 512  # the scratch buffer
    assert_holds(model, state)


def test_a_mapped_file_is_not_written_to(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("llama-gqa")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    model = lean_model(folder, mmap=True, **RAW)
    assert model.load_report.mapped_bytes
    state = other_values(model)
    load_weights_(model, state)
    assert_holds(model, state)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("calls_in", ["inference mode", "no_grad", "nothing"])
def test_inference_mode(calls_in: str, zoo: Any, tmp_path: Path) -> None:
    import copy

    with torch.inference_mode():
        frozen = copy.deepcopy(lean_model(zoo("gpt2")))
    assert all(parameter.is_inference() for parameter in frozen.parameters())
    context: Any = {
        "inference mode": torch.inference_mode,
        "no_grad": torch.no_grad,
        "nothing": torch.enable_grad,
    }[calls_in]
    ordinary = lean_model(zoo("gpt2"))
    state = other_values(frozen)
    path = written("safetensors file", state, tmp_path)
    for model in (frozen, ordinary):
        for source in (state, path):
            with context():
                load_weights_(model, {name: value * 0 for name, value in state.items()})
                load_weights_(model, source)
            assert_holds(model, state)
    assert all(p.requires_grad and not p.is_inference() for p in ordinary.parameters())


def test_a_stock_model(zoo: Any, tmp_path: Path) -> None:
    from tests.support import reference

    stock = reference.stock_model("gpt2", zoo("gpt2"), device="cpu")
    assert not isinstance(stock, LeanHookedTransformer)
    state = other_values(stock)
    for source in (state, written("shards", state, tmp_path)):
        load_weights_(stock, {name: value * 0 for name, value in state.items()})
        report = load_weights_(stock, source)
        assert_holds(stock, state)
    assert not hasattr(stock, "load_report")
    assert report.parameter_bytes > 0


def test_progress(model: Any) -> None:
    events: list[Any] = []
    load_weights_(model, other_values(model), progress=events.append)
    assert events[-1].done_bytes == events[-1].total_bytes > 0


def test_weights_tied_by_the_user(model: Any) -> None:
    model.blocks[1].attn.W_O = model.blocks[0].attn.W_O
    state = other_values(model)
    state["blocks.1.attn.W_O"] = state["blocks.0.attn.W_O"]
    load_weights_(model, state)
    assert_holds(model, state)
    assert model.blocks[1].attn.W_O is model.blocks[0].attn.W_O
