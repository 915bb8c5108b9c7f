"""Processed copies: what is saved is what is loaded, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformer_lens import HookedTransformer

from tests.support import quantized_zoo
from tests.support.comparison import NAMES, changed, differences, lean_model, run, values
from tests.support.store_helpers import RAW, assert_same, embedded, only_file
from tl_fastload import LeanHookedTransformer, load_weights_, save_lean, verify_copy
from tl_fastload.copies.manifest import read_manifest
from tl_fastload.errors import ArgumentError
from tl_fastload.hooked import layout
from tl_fastload.quantized import QuantizedTensor

SEVERAL = (
    "gpt2",
    "neox",
    "bloom",
    "llama-gqa1-tied",
    "gemma2",
    "gemma3",
    "mixtral",
    "olmo2",
    "solu",
)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({}, "float32"), (RAW, "bfloat16")],
    ids=["processed-float32", "unprocessed-bfloat16"],
)
@pytest.mark.parametrize("case_id", SEVERAL)
def test_a_copy_is_the_model(
    case_id: str, flags: dict[str, bool], dtype: str, zoo: Any, tmp_path: Path
) -> None:
    model = lean_model(zoo(case_id), dtype=dtype, **flags)
    assert model.save_lean(tmp_path / "copy") == tmp_path / "copy"
    copy = lean_model(tmp_path / "copy", **flags)
    if case_id == "solu" and dtype != "float32":  # stock's activation mixes dtypes
        assert differences(model, copy) == []
    else:
        assert_same(model, copy, case_id)
    report = copy.load_report
    assert report.mapped_bytes == report.parameter_bytes
    assert report.processing == model.load_report.processing
    assert report.source == model.load_report.source
    verify_copy(tmp_path / "copy")


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-double", "fp4"])
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
def test_a_quantized_copy_is_the_model(kind: str, case_id: str, zoo: Any, tmp_path: Path) -> None:
    folder = quantized_zoo.build(zoo, case_id)
    model = lean_model(folder, quantize=quantized_zoo.config(kind))
    model.save_lean(tmp_path / "copy")
    copy = lean_model(tmp_path / "copy")
    _assert_same_bytes(model, copy)
    assert torch.equal(run(model, case_id)[0], run(copy, case_id)[0])
    assert copy.load_report.quantization == f"{model._quantization.kind}, as saved"
    assert copy.load_report.not_quantized == model.load_report.not_quantized
    assert copy.load_report.mapped_bytes == copy.load_report.parameter_bytes
    again = lean_model(tmp_path / "copy", quantize=quantized_zoo.config(kind), mmap=False)
    _assert_same_bytes(model, again)
    with pytest.raises(ArgumentError, match=r"quantize='(int8|nf4)'.*saved with quantize="):
        lean_model(tmp_path / "copy", quantize="8bit" if kind != "int8" else "nf4")


@pytest.mark.parametrize("kind", ["int8", "nf4-double"])
def test_a_copy_of_a_quantized_checkpoint(kind: str, zoo: Any, tmp_path: Path) -> None:
    """Processing beside the bytes (scales, centring, shifts) is saved with them."""
    folder = quantized_zoo.saved(quantized_zoo.build(zoo, "gpt2"), kind)
    model = lean_model(folder)
    contents = [p.content for p in model.parameters() if isinstance(p, QuantizedTensor)]
    assert any(content.in_scale is not None for content in contents)
    assert any(content.center_out for content in contents)
    model.save_lean(tmp_path / "copy")
    copy = lean_model(tmp_path / "copy")
    _assert_same_bytes(model, copy)
    assert torch.equal(run(model, "gpt2")[0], run(copy, "gpt2")[0])


def _assert_same_bytes(one: nn.Module, other: nn.Module) -> None:
    wanted, found = dict(one.named_parameters()), dict(other.named_parameters())
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert type(tensor) is type(found[name])
        assert tensor.stride() == found[name].stride()
        if not isinstance(tensor, QuantizedTensor):
            assert torch.equal(tensor, found[name])
            continue
        (tensors, plain), (others, other_plain) = (
            tensor.content.parts(),
            found[name].content.parts(),
        )
        assert plain == other_plain
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[part], others[part]) for part in tensors)
        assert (tensor.dtype, tensor.shape) == (found[name].dtype, found[name].shape)


def test_tensors_lie_aligned_in_the_order_of_the_forward_pass(zoo: Any, tmp_path: Path) -> None:
    """Even of a model that was mapped in another order; other libraries can read the files."""
    model = lean_model(zoo("gpt2"), **RAW)
    model.save_lean(tmp_path / "copy")
    copy = lean_model(tmp_path / "copy", **RAW)
    manifest = read_manifest(tmp_path / "copy")
    with safe_open(only_file(tmp_path / "copy"), "pt") as file:
        for name, parameter in copy.named_parameters():
            module = copy.get_submodule(name.rpartition(".")[0])
            wanted = layout.forward_strides(module, name, parameter.shape)
            assert parameter.stride() == wanted
            assert parameter.data_ptr() % 64 == 0
            stored = file.get_tensor(manifest.parameters[name].tensors[""])
            order = sorted(range(parameter.dim()), key=lambda dim: -wanted[dim])
            assert torch.equal(stored, parameter.permute(order))
    assert copy.blocks[0].mlp.W_in.stride() != copy.blocks[0].attn.W_Q.stride()


def test_edits_gradients_and_ties_are_saved(tmp_path: Path) -> None:
    model = embedded()
    with torch.no_grad():
        model.blocks[0].attn.W_Q.mul_(2)
    model.blocks[1].requires_grad_(False)
    model.blocks[1].mlp.b_in = model.blocks[0].mlp.b_in
    model.blocks[1].mlp.W_in = nn.Parameter(model.blocks[1].mlp.W_in.detach()[:, ::1].flip(0))
    model.save_lean(tmp_path / "copy")
    copy = lean_model(tmp_path / "copy")
    assert_same(model, copy)
    assert copy.blocks[1].mlp.b_in is copy.blocks[0].mlp.b_in
    assert not copy.blocks[1].attn.W_Q.requires_grad


def test_a_tokenizer_comes_along(tmp_path: Path) -> None:
    model = embedded()
    model.tokenizer.padding_side = "left"
    model.save_lean(tmp_path / "copy")
    copy = lean_model(tmp_path / "copy")
    text = "the cat sat"
    assert torch.equal(copy.to_tokens(text), model.to_tokens(text))
    assert copy.tokenizer.padding_side == "left"
    assert copy.cfg.tokenizer_name == model.cfg.tokenizer_name
    assert lean_model(tmp_path / "copy", default_padding_side="right").tokenizer.padding_side == (
        "right"
    )
    arguments = {"default_padding_side": "right", "default_prepend_bos": False}
    copy = lean_model(tmp_path / "copy", **arguments)
    assert copy.tokenizer.padding_side == "right"
    assert copy.cfg.default_prepend_bos is False


@pytest.mark.parametrize("wrapper", ["compile", "parallel"])
def test_a_wrapped_model(wrapper: str, tmp_path: Path) -> None:
    model = embedded()
    wrapped = (
        torch.compile(model, backend="eager") if wrapper == "compile" else nn.DataParallel(model)
    )
    save_lean(wrapped, tmp_path / "copy")
    assert_same(model, lean_model(tmp_path / "copy"))
    if wrapper == "compile":
        wrapped.save_lean(tmp_path / "copy")
        assert_same(model, lean_model(tmp_path / "copy"))


def test_a_stock_model_is_saved_with_what_its_values_show(zoo: Any, tmp_path: Path) -> None:
    model = lean_model(zoo("gpt2"))
    stock = HookedTransformer(model.cfg)
    stock.load_state_dict(model.state_dict())
    save_lean(stock, tmp_path / "copy")
    assert_same(stock, lean_model(tmp_path / "copy"), "gpt2")


def test_original_weights_into_the_copy_of_a_stock_model(zoo: Any, tmp_path: Path) -> None:
    """Rotary embeddings rule the refactoring out: nobody asked for it."""
    model = lean_model(zoo("llama-gqa"))
    stock = HookedTransformer(model.cfg)
    stock.load_state_dict(model.state_dict())
    save_lean(stock, tmp_path / "copy")
    copy = lean_model(tmp_path / "copy")
    with torch.no_grad():
        copy.blocks[0].attn.W_Q.zero_()
    load_weights_(copy, zoo("llama-gqa"))
    assert_same(model, copy)


def test_a_model_made_from_scratch(tmp_path: Path) -> None:
    cfg = {"n_layers": 1, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 5, "act_fn": "relu"}
    model = LeanHookedTransformer({**cfg, "seed": 3, "device": "cpu"})
    model.save_lean(tmp_path / "copy")
    state = torch.random.get_rng_state()
    copy = LeanHookedTransformer.from_pretrained_no_processing_lean(tmp_path / "copy", device="cpu")
    assert torch.equal(torch.random.get_rng_state(), state)  # the seed is not set again
    assert differences(model, copy) == []


def test_processing_in_place_is_recorded(tmp_path: Path) -> None:
    model = embedded(
        **RAW,
    )
    model.process_weights_()
    model.save_lean(tmp_path / "copy")
    copy = lean_model(tmp_path / "copy")
    assert_same(model, copy)
    before = values(copy)
    copy.process_weights_()
    assert changed(before, copy) == []
    assert "nothing was done" in copy.load_report.notes[-1]


def test_an_unprocessed_copy_is_never_given_as_processed(tmp_path: Path) -> None:
    model = embedded(**RAW)
    model.save_lean(tmp_path / "copy")
    with pytest.raises(ArgumentError, match=r"none; asked for: fold_ln.*_no_processing_lean"):
        lean_model(tmp_path / "copy")
    load = LeanHookedTransformer.from_pretrained_no_processing_lean
    assert_same(model, load(tmp_path / "copy", device="cpu"))


def test_arguments_that_contradict_the_copy(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    embedded(dtype="bfloat16", center_unembed=False).save_lean(folder)
    same = {"center_unembed": False}
    lean_model(folder, **same, dtype=torch.bfloat16, first_n_layers=2)
    for arguments, words in [
        ({}, "center_unembed=False"),
        (RAW, "fold_ln=True"),
        ({**same, "dtype": "float32"}, "dtype=torch.float32.*dtype=torch.bfloat16"),
        ({**same, "torch_dtype": torch.float16}, "dtype=torch.float16.*dtype=torch.bfloat16"),
        ({**same, "first_n_layers": 1}, "first_n_layers=1.*first_n_layers=2"),
        ({**same, "n_ctx": 7}, "n_ctx=7.*n_ctx="),
        ({**same, "quantize": "nf4"}, "quantize='nf4'.*nothing of the kind"),
        ({**same, "checkpoint_index": 1}, "checkpoint_index=1"),
        ({**same, "hf_model": nn.Linear(1, 1)}, "hf_model"),
        ({**same, "revision": "main"}, "revision='main'"),
        ({**same, "rope_theta": 5.0}, "rope_theta=5.0"),
    ]:
        with pytest.raises(ArgumentError, match=words) as caught:
            lean_model(folder, **arguments)
        assert str(folder) in str(caught.value)


def test_writing_never_reaches_the_file(tmp_path: Path) -> None:
    embedded().save_lean(tmp_path / "copy")
    one, other = (lean_model(tmp_path / "copy") for _ in range(2))
    before, untouched = only_file(tmp_path / "copy").read_bytes(), values(other)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.fill_(7)
    assert all(bool((parameter == 7).all()) for parameter in one.parameters())
    assert only_file(tmp_path / "copy").read_bytes() == before
    assert changed(untouched, other) == []
    verify_copy(tmp_path / "copy")


def test_saved_over_itself_while_mapped(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    embedded().save_lean(folder)
    model, other = lean_model(folder), lean_model(folder)
    before = values(other)
    with torch.no_grad():
        model.unembed.W_U.mul_(3)
    model.save_lean(folder)
    assert changed(before, other) == []  # still mapped from files that have no name any more
    assert_same(model, lean_model(folder))
    assert len(list(folder.iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_shards_and_progress(tmp_path: Path) -> None:
    model, events = embedded(), []
    model.save_lean(tmp_path / "copy", max_shard_bytes=100_000, progress=events.append)
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 3
    done = [event.done_bytes for event in events]
    assert done == sorted(done)
    assert done[-1] == events[-1].total_bytes
    assert_same(model, lean_model(tmp_path / "copy"))


@pytest.mark.parametrize("arguments", [{"mmap": False}, {"strategy": "copy"}], ids=str)
def test_reading_instead_of_mapping(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = embedded()
    model.save_lean(tmp_path / "copy")
    copy = lean_model(tmp_path / "copy", **arguments)
    shutil.rmtree(tmp_path / "copy")
    assert_same(model, copy)
    assert copy.load_report.mapped_bytes == 0


def test_a_class_with_tensors_that_are_not_in_the_copy(tmp_path: Path) -> None:
    class WithOthers(LeanHookedTransformer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.register_buffer("theirs", torch.arange(3), persistent=False)
            self.plain = torch.full((2,), 5.0)
            self.number = self.plain.sum().item()

    embedded().save_lean(tmp_path / "copy")
    copy = WithOthers.from_pretrained_lean(tmp_path / "copy", device="cpu")
    assert copy.theirs.tolist() == [0, 1, 2]
    assert copy.plain.tolist() == [5.0, 5.0]
    assert copy.number == 10.0
    tokens = torch.arange(5)[None]
    assert torch.equal(copy(tokens), embedded()(tokens))


def test_a_copy_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedded()
    monkeypatch.chdir(tmp_path)
    model.save_lean("copy")
    (tmp_path / "copy").rename(tmp_path / "elsewhere")
    copy = lean_model("elsewhere")
    assert differences(model, copy, cfg_apart=NAMES) == []
