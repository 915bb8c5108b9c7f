"""Reading what kind of quantization is meant."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from tests.support import quantized_zoo as qz
from tests.support.comparison import lean_model
from tl_fastload.cli.options import QUANTIZATIONS
from tl_fastload.errors import (
    ArgumentError,
    UnsupportedArchitectureError,
)
from tl_fastload.quantized import formats
from tl_fastload.quantized.formats import method_of, of_checkpoint, read_quantization
from tl_fastload.quantized.formats.bitsandbytes import BitsAndBytesSpec
from tl_fastload.quantized.spec import Spec, quantization_argument


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, None),
        (False, None),
        ("8bit", BitsAndBytesSpec("int8")),
        ("int8", BitsAndBytesSpec("int8")),
        ("4bit", BitsAndBytesSpec("nf4")),
        ("nf4", BitsAndBytesSpec("nf4")),
        ("fp4", BitsAndBytesSpec("fp4")),
        ({"load_in_8bit": True}, BitsAndBytesSpec("int8")),
        ({"load_in_4bit": True}, BitsAndBytesSpec("fp4")),
        (
            BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=2.0),
            BitsAndBytesSpec("int8", threshold=2.0),
        ),
        (
            BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype="bfloat16",
                llm_int8_skip_modules=["lm_head"],
            ),
            BitsAndBytesSpec(
                "nf4", double_quant=True, compute_dtype=torch.bfloat16, skip=("lm_head",)
            ),
        ),
        (
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float16},
            BitsAndBytesSpec("fp4", compute_dtype=torch.float16),
        ),
    ],
)
def test_what_is_asked_for(asked: Any, expected: Spec | None) -> None:
    found = read_quantization(asked)
    if isinstance(asked, BitsAndBytesConfig) and found is not None and expected is not None:
        # A BitsAndBytesConfig always has a compute dtype: float32 unless told.
        assert found.compute_dtype in (expected.compute_dtype, torch.float32)
        expected = BitsAndBytesSpec(**{**vars(expected), "compute_dtype": found.compute_dtype})
    assert found == expected


@pytest.mark.parametrize("asked", ["int4", "", 8, True, {}, {"load_in_8bit": False}, object()])
def test_what_means_nothing(asked: Any) -> None:
    with pytest.raises(ArgumentError):
        read_quantization(asked)


def test_the_arguments_of_older_code() -> None:
    config = BitsAndBytesConfig(load_in_8bit=True)
    for keywords, expected in (
        ({}, None),
        ({"load_in_8bit": True}, {"load_in_8bit": True}),
        ({"load_in_4bit": True}, {"load_in_4bit": True}),
        ({"load_in_8bit": False, "load_in_4bit": False, "quantization_config": None}, None),
        ({"quantization_config": config}, config),
    ):
        rest = {**keywords, "revision": "main"}
        assert quantization_argument(None, rest) == expected
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
        assert isinstance(found, BitsAndBytesSpec)
        assert (found.kind, found.threshold) == ("int8", 4.0)
        assert method_of(declared) == "bitsandbytes"
    for fields, method in (({"quant_method": "vptq"}, "vptq"), ({"bits": 4}, "an unnamed method")):
        with pytest.raises(UnsupportedArchitectureError, match=f"here is quantized with {method}"):
            of_checkpoint(_config(**fields), "here")


def test_the_command_line_offers_what_the_formats_do() -> None:
    """It names them itself, since the formats need torch; one name for each kind."""
    kinds = [formats.offered()[name] for name in QUANTIZATIONS]
    assert sorted(kinds) == sorted(set(formats.offered().values()))
    assert {name for format in formats.FORMATS for name in format.advised} <= set(QUANTIZATIONS)
