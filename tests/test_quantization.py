"""Reading what kind of quantization is meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import quantized_zoo as qz
import torch
import transformers
from comparison import lean_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from tl_fastload import dequantize
from tl_fastload.errors import (
    ArgumentError,
    LeanLoadError,
    MissingWeightsError,
    UnsupportedArchitectureError,
)
from tl_fastload.quantization import (
    Quantization,
    method_of,
    of_checkpoint,
    quantization_argument,
    read_quantization,
)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, None),
        (False, None),
        ("8bit", Quantization("int8")),
        ("int8", Quantization("int8")),
        ("4bit", Quantization("nf4")),
        ("nf4", Quantization("nf4")),
        ("fp4", Quantization("fp4")),
        ({"load_in_8bit": True}, Quantization("int8")),
        ({"load_in_4bit": True}, Quantization("fp4")),
        (
            BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=2.0),
            Quantization("int8", threshold=2.0),
        ),
        (
            BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype="bfloat16",
                llm_int8_skip_modules=["lm_head"],
            ),
            Quantization("nf4", double_quant=True, compute_dtype=torch.bfloat16, skip=("lm_head",)),
        ),
        (
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float16},
            Quantization("fp4", compute_dtype=torch.float16),
        ),
    ],
)
def test_what_is_asked_for(asked: Any, expected: Quantization | None) -> None:
    found = read_quantization(asked)
    if isinstance(asked, BitsAndBytesConfig) and found is not None and expected is not None:
        # A BitsAndBytesConfig always has a compute dtype: float32 unless told.
        assert found.compute_dtype in (expected.compute_dtype, torch.float32)
        expected = Quantization(**{**vars(expected), "compute_dtype": found.compute_dtype})
    assert found == expected


@pytest.mark.parametrize("asked", ["int4", "", 8, True, {}, {"load_in_8bit": False}, object()])
def test_what_means_nothing(asked: Any) -> None:
    with pytest.raises(ArgumentError):
        read_quantization(asked)


def test_the_arguments_of_older_code() -> None:
    config = BitsAndBytesConfig(load_in_8bit=True)
    for keywords, expected in (
        ({}, None),
        ({"load_in_8bit": True}, "8bit"),
        ({"load_in_4bit": True}, "fp4"),
        ({"load_in_8bit": False, "load_in_4bit": False, "quantization_config": None}, None),
        ({"quantization_config": config}, config),
    ):
        rest = {**keywords, "revision": "main"}
        assert quantization_argument(None, rest) is expected
        assert rest == {"revision": "main"}
    with pytest.raises(ArgumentError, match="quantize and load_in_8bit are several"):
        quantization_argument("nf4", {"load_in_8bit": True})


@pytest.mark.parametrize("argument", ["quantize", "load_in_8bit", "quantization_config"])
def test_they_mean_the_same(argument: str, zoo: Any) -> None:
    folder = qz.build(zoo, "gpt2")
    value: Any = {"quantize": "8bit", "load_in_8bit": True}.get(argument)
    model = lean_model(folder, **{argument: value or BitsAndBytesConfig(load_in_8bit=True)})
    assert model.load_report.quantization == "int8, quantized while loading"
    assert len(qz.quantized_parameters(model)) == 12
    dense = lean_model(folder, load_in_8bit=False)
    assert dense.load_report.quantization is None
    assert not qz.quantized_parameters(dense)


def _config(**fields: Any) -> Any:
    return SimpleNamespace(quantization_config=fields)


def test_what_a_configuration_declares() -> None:
    assert of_checkpoint(SimpleNamespace(), "here") is None
    assert of_checkpoint(SimpleNamespace(quantization_config=None), "here") is None
    for declared in (
        _config(load_in_8bit=True, llm_int8_threshold=4.0),
        _config(quant_method="bitsandbytes", load_in_8bit=True, llm_int8_threshold=4.0),
        SimpleNamespace(
            quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=4.0)
        ),
    ):
        found = of_checkpoint(declared, "here")
        assert found is not None
        assert (found.kind, found.threshold) == ("int8", 4.0)
        assert method_of(declared) == "bitsandbytes"
    for fields, method in (({"quant_method": "gptq"}, "gptq"), ({"bits": 4}, "an unnamed method")):
        with pytest.raises(UnsupportedArchitectureError, match=f"here is quantized with {method}"):
            of_checkpoint(_config(**fields), "here")


def _dequantized(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    return dequantize.load_dequantized(folder, config, torch.float32)


@pytest.mark.parametrize("kind", ["int8", "nf4-double"])
def test_dequantized_by_transformers(kind: str, zoo: Any) -> None:
    folder = qz.build(zoo, "llama-gqa")
    saved = qz.saved(folder, kind)
    model = lean_model(saved, hf_model=_dequantized(saved))
    expected = lean_model(qz.dense_folder("llama-gqa", folder, kind))
    assert model.load_report.quantization is None
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


def _as_fp8(folder: Path, target: Path) -> dict[str, torch.Tensor]:
    """Write a checkpoint in float8 blocks of 32 x 32; returns the values that they stand for."""
    shutil.copytree(folder, target)
    tensors = {n: t.clone() for n, t in load_file(target / "model.safetensors").items()}
    exact = {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].view(rows // 32, 32, columns // 32, 32)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        exact[name] = (codes.float() * scales[:, None, :, None]).view(rows, columns)
        tensors[name] = codes.view(rows, columns)
        tensors[f"{name}_scale_inv"] = scales
    (target / "model.safetensors").unlink()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    _declare(target, quant_method="fp8", weight_block_size=[32, 32], activation_scheme="dynamic")
    return exact


def _declare(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = fields
    (folder / "config.json").write_text(json.dumps(config))


def test_float8_is_dequantized_while_it_loads(zoo: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    exact = _as_fp8(qz.build(zoo, "llama-gqa"), folder)
    with pytest.raises(UnsupportedArchitectureError, match="fp8"):
        lean_model(folder)
    try:
        hf = _dequantized(folder)
    except UnsupportedArchitectureError as error:
        pytest.skip(str(error))
    values = hf.state_dict()
    assert all(torch.equal(values[name], value) for name, value in exact.items())
    model = lean_model(folder, hf_model=hf)
    assert not qz.quantized_parameters(model)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("gptq", UnsupportedArchitectureError),
        ("hqq", UnsupportedArchitectureError),
        ("something", UnsupportedArchitectureError),
        ("mxfp4", MissingWeightsError),
    ],
)
def test_what_cannot_be_dequantized(method: str, error: type, zoo: Any, tmp_path: Path) -> None:
    """Never random or unscaled weights, which transformers would go on with."""
    folder = tmp_path / "model"
    _as_fp8(qz.build(zoo, "llama-gqa"), folder)
    _declare(folder, quant_method=method, bits=4)
    with pytest.raises(LeanLoadError, match=method) as info:
        _dequantized(folder)
    assert isinstance(info.value, (error, UnsupportedArchitectureError))
    with pytest.raises(ArgumentError, match="is not quantized"):
        _dequantized(qz.build(zoo, "llama-gqa"))
