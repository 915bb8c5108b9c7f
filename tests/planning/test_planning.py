"""`plan`: what it reads, what it says, and what becomes of models that do not fit."""

from __future__ import annotations

import builtins
import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tl_fastload
from tests.placement.test_forecast import SIZES, UNPROCESSED
from tests.support import quantized_zoo
from tl_fastload import (
    LeanHookedTransformer,
    LeanTransformerBridge,
    LoadPlan,
    NotEnoughMemory,
    plan,
)
from tl_fastload.cli.bench.synthetic import parse_shape, weights_file, write_checkpoint
from tl_fastload.errors import ArgumentError, MissingWeightsError, UnknownModelError
from tl_fastload.planning import dry_run as drafts
from tl_fastload.planning import stock_memory
from tl_fastload.planning.plan import KINDS
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.report import available
from tl_fastload.source.reader import FileMaps, FileReader

GPT2 = {"vocab_size": 300, "n_embd": 192, "n_head": 4, "n_inner": 352, "n_layer": 10}


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(FileReader, "read", read)
    monkeypatch.setattr(FileMaps, "_storage", read)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`free(n)`: only that many bytes are available."""

    def only(size: int | None) -> None:
        for module in (drafts, available):
            monkeypatch.setattr(module, "available_bytes", lambda device: size)

    # What models of the tests' size would drown in.
    monkeypatch.setattr(drafts, "OBJECTS_BYTES", 0)
    monkeypatch.setattr(drafts, "CODE_BYTES", 0)
    return only


def load(folder: Any, **arguments: Any) -> Any:
    return LeanHookedTransformer.from_pretrained_lean(
        folder, device="cpu", progress=False, **arguments
    )


@pytest.mark.parametrize("arguments", [{}, {"quantize": "nf4"}, UNPROCESSED, {"mmap": False}])
def test_nothing_but_headers_is_read(
    arguments: Any, zoo: Any, no_reading: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = zoo("llama-gqa", **SIZES["llama-gqa"], shards=True)
    read: list[int] = []
    real = builtins.open

    def opened(path: Any, *args: Any, **kwargs: Any) -> Any:
        assert not str(path).endswith(".bin")
        return real(path, *args, **kwargs)

    def preadv(*_: Any) -> int:
        raise AssertionError("weights were read")

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(os, "preadv", preadv)
    found = plan(folder, device="cpu", **arguments)
    assert found.total_bytes > 0
    assert read == []


def test_the_arguments_are_those_of_loading() -> None:
    expected = inspect.signature(LeanHookedTransformer.from_pretrained_lean).parameters
    assert inspect.signature(plan).parameters == expected
    assert inspect.signature(plan).return_annotation is LoadPlan
    with pytest.raises(ArgumentError, match="dtype"):
        plan("gpt2", dtype="int3")
    with pytest.raises(TypeError, match="model_name"):
        plan()  # type: ignore[call-arg]


def test_planning_changes_nothing(zoo: Any, capsys: Any, caplog: Any) -> None:
    before = torch.get_rng_state()
    plan(zoo("llama"), device="cpu", dtype="bfloat16")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32
    assert capsys.readouterr().out == ""
    assert not caplog.records


def test_what_a_load_would_refuse_a_plan_refuses(zoo: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError):
        plan(tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match="layers"):
        plan(zoo("llama"), first_n_layers=99)
    config = json.loads((zoo("llama") / "config.json").read_text())
    config["intermediate_size"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(zoo("llama") / "model.safetensors", tmp_path)
    with pytest.raises(MissingWeightsError, match="misshapen"):
        plan(tmp_path)


def test_kinds(zoo: Any) -> None:
    folder = zoo("gpt2", **GPT2)
    model = load(folder)
    found = plan(folder, device="cpu")
    assert tuple(found.parameter_bytes) == KINDS
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    for kind, part in (("attention", ".attn."), ("MLP", ".mlp."), ("embedding", "embed.")):
        assert found.parameter_bytes[kind] == sum(n for name, n in sizes.items() if part in name)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert found.parameter_bytes["buffers"] == buffers
    assert found.parameter_bytes["quantized"] == 0
    assert found.total_bytes == sum(sizes.values()) + buffers
    layers = plan(folder, device="cpu", first_n_layers=1).parameter_bytes
    assert layers["MLP"] * model.cfg.n_layers == found.parameter_bytes["MLP"]


@pytest.mark.parametrize("case_id", ["gpt-oss", "mixtral"])
def test_experts_are_mapped_as_they_lie_in_the_file(case_id: str, zoo: Any) -> None:
    """TransformerLens' converter makes contiguous copies of some."""
    folder = zoo(case_id)
    copied, mapped = load(folder, **UNPROCESSED), load(folder, mmap=True, **UNPROCESSED)
    assert plan(folder, device="cpu", mmap=True, **UNPROCESSED).mapped_bytes == (
        mapped.load_report.mapped_bytes
    )
    experts = [name for name, _ in mapped.named_parameters() if ".experts." in name]
    of_experts = sum(mapped.get_parameter(name).nbytes for name in experts)
    assert mapped.load_report.mapped_bytes > of_experts > 0
    for name, parameter in copied.named_parameters():
        assert torch.equal(mapped.get_parameter(name), parameter), name


def test_mapped_weights_need_no_memory(zoo: Any, free: Any) -> None:
    folder = zoo("gpt2", **GPT2)
    free(500_000)
    found = plan(folder, device="cpu", mmap=True, **UNPROCESSED)
    assert found.fits
    assert found.mapped_bytes > 0.9 * (found.total_bytes - found.parameter_bytes["buffers"])
    assert load(folder, mmap=True, **UNPROCESSED).load_report.mapped_bytes == found.mapped_bytes
    # Without it Q, K and V are gathered, which takes memory: planned, and refused alike.
    gathered = plan(folder, device="cpu", **UNPROCESSED)
    assert gathered.advice[0].arguments == {"mmap": True}
    assert found.mapped_bytes - gathered.mapped_bytes == 10 * 3 * GPT2["n_embd"] ** 2 * 4
    with pytest.raises(NotEnoughMemory, match="mmap=True"):
        load(folder, **UNPROCESSED)


def test_loading_refuses_what_does_not_fit(zoo: Any, free: Any, no_reading: None) -> None:
    folder = zoo("gpt2", **GPT2)
    free(1000)
    with pytest.raises(NotEnoughMemory) as caught:
        load(folder)
    said = str(caught.value)
    for part in (str(folder), "1000 B", "cpu", "No weights were read", "check_memory=False"):
        assert part in said
    assert isinstance(caught.value, tl_fastload.LeanLoadError)
    assert isinstance(caught.value, MemoryError)


def test_loading_says_what_would_fit(zoo: Any, free: Any) -> None:
    folder = zoo("gpt2", **GPT2)
    free(plan(folder, device="cpu").peak_anonymous_bytes * 6 // 10)
    with pytest.raises(NotEnoughMemory, match=r"quantize='8bit' \(needs [\d.]+ MiB\)"):
        load(folder)
    assert load(folder, check_memory=False).load_report.parameter_bytes > 0
    load(folder, dtype="bfloat16")


def test_the_advice_fits(zoo: Any, free: Any) -> None:
    folder = zoo("gpt2", **GPT2)
    whole = plan(folder, device="cpu").peak_anonymous_bytes
    free(whole * 3 // 4)
    found = plan(folder, device="cpu")
    assert not found.fits
    given = [choice.arguments for choice in found.advice]
    assert {"dtype": "bfloat16"} in given
    assert UNPROCESSED in given
    assert {"quantize": "8bit"} in given
    assert {"quantize": "nf4"} in given
    layers = next(a["first_n_layers"] for a in given if "first_n_layers" in a)
    assert 1 <= layers < 10
    for choice in found.advice:
        planned = plan(folder, device="cpu", **choice.arguments)
        assert planned.fits
        assert planned.peak_anonymous_bytes == choice.needed_bytes
        assert planned.peak_host_bytes == choice.peak_host_bytes
        load(folder, **choice.arguments)
    free(whole)
    assert plan(folder, device="cpu").advice == ()


def test_quantizing_a_narrow_dtype_is_advised_when_nothing_wider_fits(zoo: Any, free: Any) -> None:
    folder = zoo("gpt2", **GPT2)
    needed = plan(folder, device="cpu", dtype="bfloat16", quantize="nf4").peak_anonymous_bytes
    free(needed)
    given = [choice.arguments for choice in plan(folder, device="cpu", mmap=False).advice]
    assert {"dtype": "bfloat16", "quantize": "nf4"} in given
    assert {"quantize": "nf4"} not in given


def test_nothing_fits(zoo: Any, free: Any) -> None:
    free(10)
    found = plan(zoo("gpt2"), device="cpu", mmap=False)
    assert not found.fits
    assert found.advice == ()
    with pytest.raises(NotEnoughMemory, match="No other dtype"):
        load(zoo("gpt2"), mmap=False)


def test_unknown_room_is_room(zoo: Any, free: Any) -> None:
    free(None)
    found = plan(zoo("gpt2"), device="cpu")
    assert found.fits
    assert found.available_host_bytes is None
    load(zoo("gpt2"))


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa", "solu", "bloom"])
def test_torch_files(case: str, zoo: Any, free: Any) -> None:
    toy = case == "solu"
    folder = zoo(case) if toy else zoo(case, bin=True)
    report = load(folder).load_report
    found = plan(folder, device="cpu")
    parameters = found.total_bytes - found.parameter_bytes["buffers"]
    assert parameters == report.parameter_bytes
    read = plan(folder, device="cpu", mmap=False)
    files = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".bin", ".pth"))
    assert read.peak_anonymous_bytes == found.peak_anonymous_bytes + files
    free(files - 1)
    with pytest.raises(NotEnoughMemory):
        load(folder, mmap=False)


def test_old_torch_files_are_not_looked_into(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("gpt2", bin=True)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found, expected = plan(tmp_path, device="cpu"), plan(folder, device="cpu")
    assert found.parameter_bytes == expected.parameter_bytes
    size = (tmp_path / "pytorch_model.bin").stat().st_size
    assert found.peak_anonymous_bytes == expected.peak_anonymous_bytes + size
    assert load(tmp_path).load_report.parameter_bytes == load(folder).load_report.parameter_bytes


def test_a_model_in_memory(zoo: Any, free: Any) -> None:
    folder = zoo("gpt2", **GPT2)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found, file = plan(folder, hf_model=hf, device="cpu"), plan(folder, device="cpu")
    assert found.source == "hf_model"
    assert found.parameter_bytes == file.parameter_bytes
    assert found.disk_bytes == 0
    report = load(folder, hf_model=hf).load_report
    parameters = found.total_bytes - found.parameter_bytes["buffers"]
    assert parameters == report.parameter_bytes
    free(1000)
    with pytest.raises(NotEnoughMemory, match="hf_model"):
        load(folder, hf_model=hf)


def test_reading_at_a_glance(zoo: Any, free: Any) -> None:
    folder = zoo("gpt2", **GPT2)
    free(plan(folder, device="cpu").peak_anonymous_bytes * 3 // 4)
    found = plan(folder, device="cpu", quantize=None)
    text, page = str(found), found._repr_html_()
    for part in ("LoadPlan", "NO", "dtype='bfloat16'", "stock", "attention", "peak host memory"):
        assert part in text
    assert "does not fit" in page
    assert "<script" not in plan(zoo("gpt2"), device="cpu")._repr_html_()
    values = json.loads(json.dumps(found.to_dict()))
    assert values["fits"] is False
    assert values["dtype"] == "float32"
    assert values["total_bytes"] == found.total_bytes
    assert values["advice"][0]["arguments"] == {"dtype": "bfloat16"}
    assert {"rooms", "parameter_bytes", "stock_peak_host_bytes", "disk_bytes"} <= values.keys()
    free(None)
    assert "fits</b>" in plan(folder, device="cpu")._repr_html_()


def test_stock_lets_go_of_the_file_before_its_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What views of the file were made of must not count on: stock has unmapped it by then.
    monkeypatch.setattr(stock_memory, "_RETURNED_FROM_BYTES", 0)  # as for big models
    shape = parse_shape("llama:d_model=256,n_layers=3,d_vocab=2048,dtype=bfloat16")
    write_checkpoint(shape, tmp_path)
    file_bytes = weights_file(tmp_path).stat().st_size

    def file_pages(**steps: Any) -> int:
        found = plan(tmp_path, device="cpu", dtype="bfloat16", **steps)
        assert found.stock_peak_host_bytes is not None
        assert found.stock_peak_anonymous_bytes is not None
        return found.stock_peak_host_bytes - found.stock_peak_anonymous_bytes

    other = file_pages()
    assert other == drafts.CODE_BYTES
    assert file_pages(**UNPROCESSED) - other > 0.8 * file_bytes


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch, free: Any) -> Any:
    """`devices(2, n, host=m)`: two CUDA devices with so many bytes each, and a host."""
    from tl_fastload.planning import over_devices
    from tl_fastload.roads import homes

    def there(count: int, size: int, host: int) -> None:
        left = {"cuda": size, "cpu": host}
        for module in (drafts, available, over_devices, homes):
            monkeypatch.setattr(module, "available_bytes", lambda device: left[device.type])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(homes, "check_usable", lambda device, asked: None)

    return there


@pytest.mark.parametrize("count", [1, 2])
def test_a_map_is_advised(count: int, zoo: Any, devices: Any) -> None:
    """Over two devices that hold it together, or one and the host; told what it costs."""
    folder = zoo("gpt2", **GPT2)
    whole = plan(folder, device="cpu", dtype="bfloat16").total_bytes
    devices(count, whole * 4 // 5, 10 * whole)
    found = plan(folder, device="cuda", dtype="bfloat16")
    assert not found.fits
    choice = next(one for one in found.advice if "device_map" in one.arguments)
    limits = choice.arguments["max_memory"]
    assert choice.arguments["device_map"] == "auto"
    assert choice.arguments["device"] is None
    assert list(limits) == [*range(count), "cpu"]
    planned = plan(folder, dtype="bfloat16", **choice.arguments)
    assert planned.fits
    assert planned.streamed_bytes == choice.streamed_bytes
    assert planned.peak_device_bytes == choice.peak_device_bytes
    if count == 2:
        assert choice.streamed_bytes == 0
        assert "cuda:0" in planned.device
        assert "cuda:1" in planned.device
    else:
        assert 0 < choice.streamed_bytes < whole
        assert "each forward pass copies" in str(choice)
        assert "copied in each pass" in str(planned)


def test_a_bridge_over_devices(zoo: Any, devices: Any) -> None:
    """`n_devices=` is a balanced map, as in TransformerLens; one of several is advised."""
    folder = zoo("gpt2", **GPT2)
    whole = LeanTransformerBridge.plan(folder, device="cpu").total_bytes
    devices(2, whole * 4 // 5, 10 * whole)
    found = LeanTransformerBridge.plan(folder, device="cuda")
    assert not found.fits
    balanced = LeanTransformerBridge.plan(folder, device="cuda", n_devices=2)
    (note,) = [note for note in balanced.notes if note.startswith("Device map")]
    assert note.startswith("Device map: cuda:0: embed")
    assert "; cuda:1: blocks." in note
    assert "cpu" not in note
    choice = next(one for one in found.advice if "device_map" in one.arguments)
    assert LeanTransformerBridge.plan(folder, **choice.arguments).fits


@pytest.mark.parametrize("form", ["nf4", "8bit", "fp8"])
def test_maps_count_what_quantized_weights_take(form: str, zoo: Any) -> None:
    """With scales: what fits exactly is not sent to the disk, and what lacks a byte is."""
    folder, arguments = zoo("gpt2", **GPT2), {"dtype": "bfloat16", "quantize": form}
    if form == "fp8":
        folder = quantized_zoo.saved(quantized_zoo.build(zoo, "llama-gqa"), form)
        arguments = {"dtype": "float32"}
    size = sum(map(held_bytes, load(folder, **arguments).state_dict().values()))
    for limit in (size, size - 1):
        found = plan(folder, device_map="auto", max_memory={"cpu": limit}, **arguments)
        (note,) = [note for note in found.notes if note.startswith("Device map")]
        assert ("disk" in note) == (limit < size)


def held_bytes(tensor: Any) -> int:
    if isinstance(tensor, QuantizedTensor):
        return sum(part.nbytes for part in tensor.content.tensors().values())
    return int(tensor.nbytes)
