"""`dequantize=True`: ordinary weights, dequantized here or by transformers, or an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.support import quantized_zoo as qz
from tests.support import reference
from tests.support import zoo as zoo_module
from tests.support.comparison import lean_model
from tl_fastload.errors import (
    ArgumentError,
    LeanLoadError,
    MissingWeightsError,
    QuantizationError,
    UnsupportedArchitectureError,
)
from tl_fastload.quantized import formats

Tensors = dict[str, torch.Tensor]
# Values of a 4-bit float with two exponent bits and one mantissa bit, by its code (OCP MX format).
FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
GPT_OSS = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 64,
}


def _rewrite(source: Path, target: Path, change: Callable[[Tensors], Any], **declared: Any) -> Any:
    """Copy a checkpoint, change its tensors, and declare how it is quantized."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = {name: value.clone() for name, value in reference.read_weights(target).items()}
    result = change(tensors)
    for old in target.glob("*.safetensors*"):
        old.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = declared
    (target / "config.json").write_text(json.dumps(config))
    return result


def _fp8(tensors: Tensors) -> Tensors:
    """Store projections in float8 blocks of 32 x 32; returns the values that they stand for."""
    exact = {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].view(rows // 32, 32, columns // 32, 32)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        exact[name] = (codes.float() * scales[:, None, :, None]).view(rows, columns)
        tensors[name] = codes.view(rows, columns)
        tensors[f"{name}_scale_inv"] = scales
    return exact


def _mxfp4(tensors: Tensors) -> Tensors:
    """Store experts in blocks of 32 4-bit floats that share a power of two; returns the values.

    Experts are [expert, in, out] in transformers, and packed along the input: two codes a byte,
    the earlier one in the low half, scales with 127 added to the exponent.
    """
    exact = {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        codes = torch.randint(16, (*shape, 32), generator=generator, dtype=torch.uint8)
        exponents = torch.randint(-7, -3, shape, generator=generator)
        values = FP4_VALUES[codes.long()] * torch.exp2(exponents.float())[..., None]
        exact[name] = values.reshape(experts, outputs, inputs).transpose(1, 2)
        tensors[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        tensors[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    return exact


FP8_CONFIG = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
MXFP4_CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
ROADS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "fp8": ("llama-gqa", _fp8, FP8_CONFIG),
    "mxfp4": ("gpt-oss", _mxfp4, MXFP4_CONFIG),
}


@pytest.fixture(params=ROADS)
def made(request: Any, zoo: Any, tmp_path: Path) -> tuple[str, str, Path, Tensors]:
    """(method, case, a checkpoint, what its quantized weights stand for by transformers' names)."""
    case_id, change, declared = ROADS[request.param]
    source = zoo(case_id, **GPT_OSS) if case_id == "gpt-oss" else qz.build(zoo, case_id)
    exact = _rewrite(source, tmp_path / "model", change, **declared)
    return request.param, case_id, tmp_path / "model", exact


def _transformers_own(folder: Path) -> Any:
    """transformers dequantizes these by itself where it has no kernels."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(params=["here", "by transformers"])
def road(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who dequantizes: a method that no format reads is transformers' own to dequantize."""
    if request.param == "by transformers":
        monkeypatch.setattr(formats, "FORMATS", ())
    return str(request.param)


@pytest.mark.parametrize("flags", [{}, reference.NO_PROCESSING], ids=["processed", "unprocessed"])
def test_methods_that_transformers_dequantizes_while_loading(
    made: tuple[str, str, Path, Tensors], road: str, flags: Any
) -> None:
    method, case_id, folder, exact = made
    hf = _transformers_own(folder)
    values = hf.state_dict()
    assert all(torch.equal(values[name].float(), value) for name, value in exact.items())
    assert len(exact) >= 4
    tokens = zoo_module.tokens(case_id)
    with torch.no_grad():
        expected = reference.log_probs(hf(tokens).logits)
    again = lean_model(folder, hf_model=hf, **flags)
    if road == "by transformers":
        with pytest.raises(UnsupportedArchitectureError, match=f"{method}.*dequantize=True"):
            lean_model(folder, **flags)
    else:  # bytes stay bytes, and their values are transformers' own
        quantized = lean_model(folder, **flags)
        assert qz.gap(qz.log_probs(quantized, case_id), expected) < 1e-4
        held = qz.quantized_parameters(quantized)
        assert len(held) >= len(exact)
        if flags:
            for name, weight in held.items():
                assert torch.equal(weight.dequantize(), again.get_parameter(name)), name
    model = lean_model(folder, dequantize=True, **flags)
    assert qz.gap(qz.log_probs(model, case_id), expected) < 1e-4
    assert not qz.quantized_parameters(model)
    assert model.load_report.quantization is None
    assert model.load_report.not_quantized == {}
    for name, parameter in again.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize("flags", [{}, reference.NO_PROCESSING], ids=["processed", "unprocessed"])
@pytest.mark.parametrize("kind", ["int8", "nf4-double", "fp4"])
@pytest.mark.parametrize("case_id", ["llama-gqa", "gpt2"])
@pytest.mark.usefixtures("road")
def test_bitsandbytes(case_id: str, kind: str, flags: Any, zoo: Any) -> None:
    folder = qz.build(zoo, case_id)
    expected = lean_model(qz.dense_folder(case_id, folder, kind), **flags)
    model = lean_model(qz.saved(folder, kind), dequantize=True, **flags)
    assert model.load_report.quantization is None
    assert not qz.quantized_parameters(model)
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_arguments(zoo: Any) -> None:
    folder = qz.build(zoo, "llama-gqa")
    with pytest.raises(ArgumentError, match="is not quantized: leave dequantize= out"):
        lean_model(folder, dequantize=True)
    dtypes = {
        p.dtype
        for p in lean_model(
            qz.saved(folder, "nf4"), dequantize=True, dtype=torch.bfloat16
        ).parameters()
    }
    assert dtypes == {torch.bfloat16}


def _packed(tensors: Tensors) -> None:
    """Store projections as GPTQ and AWQ do: eight codes to an int32."""
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        rows, columns = tensors.pop(name).shape
        layer = name.removesuffix(".weight")
        tensors[f"{layer}.qweight"] = torch.ones(columns // 8, rows, dtype=torch.int32)
        tensors[f"{layer}.qzeros"] = torch.ones(1, rows // 8, dtype=torch.int32)
        tensors[f"{layer}.scales"] = torch.ones(1, rows, dtype=torch.float16)


# As their own tools write them, without the packages that would compute with them.
WITHOUT_A_ROAD: dict[str, dict[str, Any]] = {
    "vptq": {"config_for_layers": {}, "shared_layer_config": {}},
    "auto-round": {"bits": 4, "group_size": 128, "packing_format": "auto_round:auto_gptq"},
    "hqq": {"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
    "compressed-tensors": {"format": "something-new", "config_groups": {}},
    "quanto": {"weights": "int8"},
    "sinq": {"nbits": 4},
    "something-new": {"bits": 3},
}


@pytest.mark.parametrize("method", WITHOUT_A_ROAD)
def test_methods_without_a_road(method: str, zoo: Any, tmp_path: Path) -> None:
    """Both errors name the method; the second says what was missing, and what to do instead."""
    folder = tmp_path / "model"
    declared = {"quant_method": method, **WITHOUT_A_ROAD[method]}
    _rewrite(qz.build(zoo, "llama-gqa"), folder, _packed, **declared)
    remedy = "take the unquantized" if method in formats.NOWHERE else "Pass dequantize=True"
    with pytest.raises(UnsupportedArchitectureError, match=rf"with {method}, .*{remedy}"):
        lean_model(folder)
    with pytest.raises(
        UnsupportedArchitectureError,
        match=rf"cannot dequantize .*with {method} \(\w+: .*Take the unquantized checkpoint",
    ):
        lean_model(folder, dequantize=True)


@pytest.mark.parametrize("method", ["gptq", "hqq", "something", "mxfp4"])
def test_weights_that_are_not_what_the_method_makes(method: str, zoo: Any, tmp_path: Path) -> None:
    """Never random or unscaled weights, which transformers would go on with."""
    folder = tmp_path / "model"
    _rewrite(qz.build(zoo, "llama-gqa"), folder, _fp8, quant_method=method, bits=4)
    with pytest.raises(LeanLoadError, match=method) as info:
        lean_model(folder, dequantize=True)
    kinds = (MissingWeightsError, UnsupportedArchitectureError, QuantizationError)
    assert isinstance(info.value, kinds)


@pytest.mark.parametrize("piece", ["weight_scale_inv", "weight"])
def test_missing_pieces(piece: str, zoo: Any, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        _fp8(tensors)
        tensors.pop(f"model.layers.1.mlp.down_proj.{piece}")

    folder = tmp_path / "model"
    _rewrite(qz.build(zoo, "llama-gqa"), folder, change, **FP8_CONFIG)
    with pytest.raises(LeanLoadError, match="fp8"):
        lean_model(folder, dequantize=True)
