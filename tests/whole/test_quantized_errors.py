"""Quantization that cannot be: one family of errors, before any weight is read."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig

from tests.support import quantized_zoo as qz
from tests.support import reference
from tests.support.comparison import lean_model
from tests.support.folders import edited_copy
from tl_fastload import LeanHookedTransformer
from tl_fastload.embedded_model import embedded_model_path
from tl_fastload.errors import (
    ArgumentError,
    LeanLoadError,
    MissingWeightsError,
    QuantizationError,
    UnsupportedArchitectureError,
)
from tl_fastload.quantized import formats
from tl_fastload.quantized.formats import bitsandbytes_kernels as kernels
from tl_fastload.quantized.recipes import QuantizedSource
from tl_fastload.source.reader import FileSource

LAYER = "model.layers.1.mlp.down_proj"
Tensors = dict[str, torch.Tensor]
Variant = Callable[..., Path]


@pytest.fixture
def folder(zoo: Any) -> Path:
    return qz.build(zoo, "llama-gqa")


@pytest.fixture
def variant(folder: Path, tmp_path: Path) -> Variant:
    """`variant(kind, edit_tensors, quantization_config)` -> a folder of its own."""

    def make(kind: str, edit: Callable[[Tensors], Any] | None = None, declared: Any = ...) -> Path:
        def declare(fields: dict[str, Any]) -> None:
            if declared is not ...:
                fields.pop("quantization_config", None)
            if declared is not ... and declared is not None:
                fields["quantization_config"] = declared

        source = qz.saved(folder, kind) if kind else folder
        return edited_copy(source, tmp_path / "model", edit, declare)

    return make


class WasReadError(Exception):
    """A weight was read."""


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a weight fails the test; the few bytes that describe others may be read."""
    read_into = FileSource.read_into

    def only_descriptions(source: FileSource, *args: Any) -> None:
        if not source.name.endswith(formats.descriptions()):
            raise WasReadError(source.name)
        read_into(source, *args)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise WasReadError

    monkeypatch.setattr(FileSource, "read_into", only_descriptions)
    monkeypatch.setattr(QuantizedSource, "matrix", refuse)
    monkeypatch.setattr(kernels, "quantize_int8", refuse)
    monkeypatch.setattr(kernels, "quantize_4bit", refuse)


def _drop(piece: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(f"{LAYER}.{piece}")


def _cut(piece: str) -> Callable[[Tensors], Any]:
    def edit(tensors: Tensors) -> None:
        tensors[f"{LAYER}.{piece}"] = tensors[f"{LAYER}.{piece}"][:-1].clone()

    return edit


STATE = "weight.quant_state.bitsandbytes__nf4"
BROKEN = [
    ("int8", _drop("SCB"), "without its scales"),
    ("int8", _cut("SCB"), "one float32 scale"),
    ("int8", _cut("weight"), "one float32 scale"),
    ("int8", _drop("weight"), "itself is missing"),
    ("nf4", _drop("weight.absmax"), "without weight.absmax"),
    ("nf4", _cut("weight.absmax"), "as absmax"),
    ("nf4", _cut("weight"), "as packed"),
    ("nf4", _drop("weight.quant_map"), "without weight.quant_map"),
    ("nf4", _drop(STATE), "exactly one"),
    ("nf4-double", _drop("weight.nested_absmax"), "without weight.nested_absmax"),
    ("nf4-double", _cut("weight.nested_absmax"), "as nested_absmax"),
]


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(("kind", "edit", "message"), BROKEN)
def test_missing_or_misshapen_scales(
    kind: str, edit: Any, message: str, mmap: bool, variant: Variant
) -> None:
    with pytest.raises(QuantizationError, match=rf"^{LAYER}: .*{message}"):
        lean_model(variant(kind, edit), mmap=mmap)


def test_a_quantized_weight_of_another_shape(variant: Variant) -> None:
    def edit(tensors: Tensors) -> None:
        _cut("SCB")(tensors)
        _cut("weight")(tensors)

    with pytest.raises(MissingWeightsError, match=r"down_proj.weight is \(127, 256\)"):
        lean_model(variant("int8", edit))


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CONTRADICTIONS = [
    ("int8", NF4, "holds int8 weights, but the configuration declares nf4"),
    ("nf4", {"load_in_8bit": True}, "holds nf4 weights, but the configuration declares int8"),
    ("nf4", {**NF4, "bnb_4bit_quant_type": "fp4"}, "holds nf4 .* declares fp4"),
    ("", {"load_in_8bit": True}, "declares int8 weights, but the checkpoint has none"),
    ("int8", {}, "neither load_in_8bit nor load_in_4bit"),
    ("int8", {**NF4, "load_in_8bit": True}, "contradict each other"),
    ("nf4", {**NF4, "bnb_4bit_quant_type": "af4"}, "neither 'nf4' nor 'fp4'"),
    ("int8", None, 'config.json has no quantization_config.*"load_in_8bit": true'),
    ("nf4", None, 'config.json has no quantization_config.*"bnb_4bit_quant_type": "nf4"'),
    ("fp4", None, 'config.json has no quantization_config.*"bnb_4bit_quant_type": "fp4"'),
    ("nf4", {"load_in_8bit": True, "load_in_4bit": False}, "declares int8"),
    ("int8", {**NF4, "load_in_8bit": False}, "holds int8 .* declares nf4"),
]


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(("kind", "declared", "message"), CONTRADICTIONS)
def test_configurations_that_contradict_the_checkpoint(
    kind: str, declared: Any, message: str, variant: Variant
) -> None:
    if declared is not None:
        declared = {"quant_method": "bitsandbytes", **declared}
    folder = variant(kind, declared=declared)
    with pytest.raises(LeanLoadError, match=message):
        lean_model(folder)
    if declared is None:  # asking for quantization does not make bytes weights
        with pytest.raises(LeanLoadError, match=message):
            lean_model(folder, quantize="8bit")


def _bare(tensors: Tensors) -> None:
    for name in [name for name in tensors if "SCB" in name or "weight_format" in name]:
        del tensors[name]


def _packed(tensors: Tensors) -> None:
    tensors[f"{LAYER}.qweight"] = torch.ones(4, 4, dtype=torch.int32)


def _scaled(tensors: Tensors) -> None:
    weight = tensors[f"{LAYER}.weight"]
    tensors[f"{LAYER}.weight"] = weight.to(torch.float8_e4m3fn)
    tensors[f"{LAYER}.weight_scale_inv"] = torch.ones(1, 1)


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("int8", _bare, r"\.weight \(torch.int8\) belongs to quantized weights"),
        ("", _packed, r"down_proj.qweight \(torch.int32\) belongs to quantized weights"),
        ("", _scaled, r"down_proj.weight_scale_inv .* belongs to quantized weights"),
    ],
)
def test_quantized_bytes_that_no_configuration_declares(
    kind: str, edit: Any, message: str, variant: Variant
) -> None:
    with pytest.raises(QuantizationError, match=message + ".*no quantization_config"):
        lean_model(variant(kind, edit, declared=None))


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(
    "asked",
    [{"quantize": "nf4"}, {"load_in_8bit": True}, {"quantization_config": qz.CONFIGS["int8"]}],
)
def test_quantizing_what_is_quantized(asked: Any, folder: Path) -> None:
    with pytest.raises(ArgumentError, match=r"quantized already \(nf4\): leave quantize= out"):
        lean_model(qz.saved(folder, "nf4"), **asked)
    with pytest.raises(ArgumentError, match=r"hf_model is quantized already \(int8\)"):
        lean_model(folder, hf_model=qz.hf_model(folder, "int8"), **asked)


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"quantize": "int4"}, "'int4' is none of"),
        ({"quantize": 8}, "quantize=8 is none of"),
        ({"quantize": BitsAndBytesConfig()}, "neither load_in_8bit nor load_in_4bit"),
        ({"quantization_config": {**NF4, "bnb_4bit_quant_type": "af4"}}, "neither 'nf4' nor"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "several ways to say one thing"),
        ({"quantize": "8bit", "load_in_8bit": True}, "several ways to say one thing"),
        ({"quantize": "8bit", "strategy": "copy"}, "copying load cannot do"),
    ],
)
def test_arguments(asked: Any, message: str, folder: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        lean_model(folder, **asked)


OTHERS = ["aqlm", "vptq"]
NOWHERE = ["hqq", "quanto", "sinq"]


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("method", OTHERS)
def test_other_methods(method: str, variant: Variant) -> None:
    folder = variant("", declared={"quant_method": method, "bits": 4})
    with pytest.raises(UnsupportedArchitectureError, match=f"with {method}.*dequantize=True"):
        lean_model(folder)


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("method", NOWHERE)
def test_methods_that_nobody_reads(method: str, variant: Variant) -> None:
    folder = variant("", declared={"quant_method": method, "bits": 4})
    with pytest.raises(
        UnsupportedArchitectureError, match=f"with {method}.*unquantized checkpoint"
    ):
        lean_model(folder)


@pytest.fixture
def fresh_import(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bitsandbytes is looked for anew, and found again after the test."""
    kernels.bitsandbytes.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    kernels.bitsandbytes.cache_clear()


ROADS: list[Any] = [
    pytest.param(lambda folder: lean_model(folder, quantize="8bit"), id="quantize"),
    pytest.param(lambda folder: lean_model(qz.saved(folder, "nf4")), id="saved"),
]


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("road", ROADS)
def test_no_bitsandbytes(road: Any, folder: Path, fresh_import: Any) -> None:
    qz.saved(folder, "nf4")
    fresh_import.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(QuantizationError, match=r"cannot be imported.*pip install"):
        road(folder)


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("road", ROADS)
def test_an_old_bitsandbytes(road: Any, folder: Path, fresh_import: Any) -> None:
    qz.saved(folder, "nf4")
    fresh_import.setattr("bitsandbytes.__version__", "0.42.1")
    with pytest.raises(QuantizationError, match=r"0.42.1 is too old.*pip install"):
        road(folder)


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("road", ROADS)
def test_no_kernels_for_the_device(road: Any, folder: Path, fresh_import: Any) -> None:
    qz.saved(folder, "nf4")
    fresh_import.setattr("bitsandbytes.supported_torch_devices", {"cuda", "xpu"})
    with pytest.raises(QuantizationError, match="no kernels for device cpu, only for cuda, xpu"):
        road(folder)


def test_layers_that_are_not_quantized_yet(folder: Path) -> None:
    """`llm_int8_has_fp16_weight` keeps weights of 16 bits in an 8-bit layer."""
    hf = qz.hf_model(folder, "int8", llm_int8_has_fp16_weight=True)
    if next(layer for _, layer in qz.layers(hf)).weight.dtype == torch.int8:
        pytest.skip("this transformers quantizes them all the same")
    with pytest.raises(QuantizationError, match="not quantized yet"):
        lean_model(folder, hf_model=hf)


def test_values_that_8_bits_cannot_scale(zoo: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(qz.build(zoo, "llama-gqa"), folder)
    tensors = {name: value.clone() for name, value in reference.read_weights(folder).items()}
    tensors[f"{LAYER}.weight"][3, 5] = 1e30
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match="beyond float16"):
        lean_model(folder, quantize="8bit")


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("road", ROADS)
def test_a_good_load_does_read(road: Any, folder: Path) -> None:
    """So that the fixture would notice."""
    qz.saved(folder, "nf4")
    with pytest.raises(WasReadError):
        road(folder)


def test_processing_a_processed_quantized_model_changes_nothing() -> None:
    loaded = LeanHookedTransformer.from_pretrained_lean(embedded_model_path(), quantize="8bit")
    loaded.process_weights_()
    assert any("nothing was done" in note for note in loaded.load_report.notes)
