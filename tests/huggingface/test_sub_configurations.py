"""What stands in a part of a configuration only, as in that of a multimodal model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support import adapters, reference
from tests.support.comparison import lean_model
from tests.support.zoo import CASES
from tl_fastload import load_weights_, plan
from tl_fastload.ground.compat import CONFIG_DTYPE_NAME
from tl_fastload.ground.hf_configs import declared_dtype, parts_of
from tl_fastload.hooked.architectures import SUPPORTED_ARCHITECTURES
from tl_fastload.huggingface.empty import for_an_empty_model
from tl_fastload.quantized.formats import of_checkpoint

CASE = "gemma3-vision"
pytestmark = pytest.mark.skipif(
    CASES[CASE].architecture not in SUPPORTED_ARCHITECTURES, reason=f"no {CASE} here"
)


@pytest.fixture(scope="module")
def folder(zoo: Any) -> Path:
    """Weights in float32, and a dtype for the language model only, as old files have it."""
    path = zoo(CASE, pad_token_id=0) / "config.json"
    values = json.loads(path.read_text())
    for part in (values, values["text_config"], values["vision_config"]):
        for key in ("dtype", "torch_dtype"):
            part.pop(key, None)
    values["text_config"][CONFIG_DTYPE_NAME] = "bfloat16"
    path.write_text(json.dumps(values))
    return path.parent


def _equal(one: Any, other: Any) -> None:
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_cast_to_what_is_asked_for_only(dtype: torch.dtype, folder: Path) -> None:
    hf_model = AutoModelForCausalLM.from_pretrained(folder, **{CONFIG_DTYPE_NAME: dtype})
    for flags in ({}, reference.NO_PROCESSING):
        lean = lean_model(folder, dtype=dtype, **flags)
        _equal(lean, lean_model(folder, hf_model=hf_model, dtype=dtype, **flags))
        with torch.no_grad():
            for parameter in lean.parameters():
                parameter.zero_()
        load_weights_(lean, folder)
        _equal(lean, lean_model(folder, dtype=dtype, **flags))


def test_adapters_and_quantization_start_from_the_same_weights(
    folder: Path, tmp_path: Path
) -> None:
    adapter = adapters.for_case(CASE, folder, tmp_path / "adapter")
    merged = adapters.merged_by_peft(CASE, folder, adapter)
    lean, wanted = lean_model(folder, adapter=adapter), lean_model(folder, hf_model=merged)
    for name, parameter in lean.named_parameters():
        assert torch.allclose(parameter, wanted.get_parameter(name), atol=1e-5), name
    ids = torch.arange(3, 12)[None]
    hf_model = AutoModelForCausalLM.from_pretrained(folder, **{CONFIG_DTYPE_NAME: torch.float32})
    one = lean_model(folder, quantize="int8")
    other = lean_model(folder, hf_model=hf_model, quantize="int8")
    with torch.no_grad():
        assert torch.equal(one(ids), other(ids))


def test_other_things_that_a_part_may_say(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert declared_dtype(config) == torch.bfloat16
    config.text_config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    spec = of_checkpoint(config, "it")
    assert spec is not None
    assert spec.kind == "int8"
    plain = for_an_empty_model(config, torch.float32)
    assert len(parts_of(plain)) >= 3
    for part in parts_of(plain):
        # A part that named one would be made under another default dtype, for all threads.
        assert getattr(part, CONFIG_DTYPE_NAME) == (torch.float32 if part is plain else None)
        assert part._attn_implementation == "eager"
        assert getattr(part, "quantization_config", None) is None
    assert config.text_config.quantization_config
    assert plan(folder).fits
