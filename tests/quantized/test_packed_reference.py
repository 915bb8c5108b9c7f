"""Formats that are only read, against the libraries that define them: values bit for bit."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from tests.support import quantized_zoo as qz
from tests.support import reference
from tests.support import zoo as zoo_module
from tests.support.comparison import lean_model
from tests.support.quantized_kinds import dense_matrix
from tl_fastload.quantized import formats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def _ours(declared: dict[str, Any], pieces: dict[str, torch.Tensor]) -> Any:
    spec = next(s for f in formats.FORMATS if (s := f.declared(declared)) is not None)
    return formats.of_kind(spec.kind).assemble(pieces, spec)


def _scales(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "powers":
        return torch.randint(100, 140, shape, generator=generator, dtype=torch.uint8)
    return torch.rand(shape, generator=generator).add_(0.01).to(getattr(torch, kind))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "powers"])
@pytest.mark.parametrize(
    ("block", "shape"), [([32, 64], (3, 4)), ([96, 256], (1, 1)), (None, (96, 1)), (None, ())]
)
def test_fp8_of_transformers(kind: str, block: Any, shape: tuple[int, ...]) -> None:
    """Every code there is, NaN included."""
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(module, "Fp8Dequantize") or not hasattr(module.Fp8Dequantize, "_unpack_fp4"):
        pytest.skip("this transformers dequantizes some of these only")
    codes = torch.arange(96 * 256).remainder(256).to(torch.uint8).view(96, 256)
    codes = codes.view(torch.float8_e4m3fn)
    scales = _scales(kind, shape)
    ours = _ours({**FP8, "weight_block_size": block}, {"weight": codes, "weight_scale_inv": scales})
    for dtype in DTYPES:
        expected = module.Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=dtype)
        found = ours.dense(dtype)
        assert found.dtype == dtype
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_mxfp4_of_transformers() -> None:
    module = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 24, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(90, 140, (3, 24, 2), generator=generator, dtype=torch.uint8)
    pieces = {"gate_up_proj_blocks": blocks, "gate_up_proj_scales": scales}
    ours = _ours({"quant_method": "mxfp4"}, pieces)
    as_parameter = formats.of_kind("mxfp4").as_parameter
    for dtype in (torch.float32, torch.bfloat16):
        expected = module.convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        assert torch.equal(as_parameter(ours.dense(dtype), pieces), expected)
        rows = ours.rows(torch.arange(24, 48, 2))
        assert rows.packed.data_ptr() == ours.packed[24:].data_ptr()  # a view
        assert torch.equal(rows.dense(dtype), expected[1, :, ::2].T)


WAYS: dict[str, dict[str, Any]] = {
    "float-channel": {"type": "float", "strategy": "channel"},
    "float-tensor": {"type": "float", "strategy": "tensor"},
    "float-block": {"type": "float", "strategy": "block", "block_structure": [32, 48]},
    "float-group": {"type": "float", "strategy": "group", "group_size": 32},
    "int-channel": {"type": "int", "strategy": "channel"},
    "int-tensor": {"type": "int", "strategy": "tensor"},
    "int-group-asymmetric": {
        "type": "int",
        "strategy": "group",
        "group_size": 32,
        "symmetric": False,
    },
    "int-channel-asymmetric": {"type": "int", "strategy": "channel", "symmetric": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_the_compressed_tensors_library_writes(way: str) -> None:
    """Its own compression, read here and by itself: with float32 scales, in float32."""
    pytest.importorskip("compressed_tensors")
    schemes: Any = importlib.import_module("compressed_tensors.quantization")
    compressors: Any = importlib.import_module("compressed_tensors.compressors")
    weights = {"num_bits": 8, "symmetric": True, **WAYS[way]}
    scheme = schemes.QuantizationScheme(
        targets=["Linear"],
        weights=schemes.QuantizationArgs(**weights),
        input_activations=schemes.QuantizationArgs(
            num_bits=8, type=weights["type"], strategy="token", dynamic=True
        ),
    )
    matrix = dense_matrix(96, 256)
    grid = {
        "tensor": (1,),
        "channel": (96, 1),
        "group": (96, 8),
        "block": (3, 6),
    }[weights["strategy"]]
    state = {"weight": matrix, "weight_scale": _scales("float32", grid) / 500}
    if not weights["symmetric"]:
        zeros = torch.arange(state["weight_scale"].numel()).reshape(grid) % 9 - 4
        state["weight_zero_point"] = zeros.to(torch.int8)
    named = f"{weights['type']}-quantized"
    compressor = compressors.BaseCompressor.get_value_from_registry(named)
    stored = compressor.compress(state, scheme)
    config = schemes.QuantizationConfig(
        config_groups={"group_0": scheme}, format=named, quantization_status="compressed"
    )
    ours = _ours(config.to_dict(), stored)
    expected = compressor.decompress(stored, scheme)["weight"]
    assert torch.equal(ours.dense(torch.float32), expected)
    assert (expected - matrix).norm() < matrix.norm()  # it was this matrix


TORCHAO: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("Int8WeightOnlyConfig", {"version": 2}),
    "float8": ("Float8WeightOnlyConfig", {"version": 2}),
    "activations": ("Int8DynamicActivationInt8WeightConfig", {"version": 2}),
    "rows": ("IntxWeightOnlyConfig", {"weight_dtype": torch.int8}),
    "groups": ("IntxWeightOnlyConfig", {"weight_dtype": "int4", "group_size": 32}),
    "asymmetric": (
        "IntxWeightOnlyConfig",
        {"weight_dtype": "int4", "group_size": 32, "mapping_type": "ASYMMETRIC"},
    ),
}


def _torchao_config(way: str) -> Any:
    quantization: Any = importlib.import_module("torchao.quantization")
    kind, settings = TORCHAO[way]
    settings = dict(settings)
    if settings.get("weight_dtype") == "int4":
        settings["weight_dtype"] = torch.int4
    if "group_size" in settings:
        settings["granularity"] = quantization.PerGroup(settings.pop("group_size"))
    if "mapping_type" in settings:
        settings["mapping_type"] = quantization.MappingType[settings["mapping_type"]]
    return getattr(quantization, kind)(**settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", TORCHAO)
def test_what_torchao_writes(way: str, dtype: torch.dtype) -> None:
    """Its tensors, flattened as they are saved, and its own dequantization in their dtype."""
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    core: Any = importlib.import_module("torchao.core.config")
    layer = torch.nn.Linear(256, 96, bias=False)
    layer.weight.data = dense_matrix(96, 256)
    model, config = torch.nn.Sequential(layer).to(dtype), _torchao_config(way)
    importlib.import_module("torchao.quantization").quantize_(model, config)
    stored, _ = support.flatten_tensor_state_dict(model.state_dict())
    pieces = {name.removeprefix("0."): part for name, part in stored.items()}
    declared = {
        "quant_method": "torchao",
        "quant_type": {"default": core.config_to_dict(config)},
    }
    expected = model[0].weight.dequantize()
    ours, (shared, compute_dtype) = _ours(declared, pieces), formats.of_layer(model[0], "weight")
    assert compute_dtype is None
    assert ours.kind == shared.kind == "torchao"
    assert (ours.zero_points is None) == (shared.zero_points is None) == (way != "asymmetric")
    assert torch.equal(ours.dense(dtype), expected)
    assert torch.equal(shared.dense(dtype), expected)
    assert shared.codes.data_ptr() == model[0].weight.qdata.data_ptr()


@pytest.mark.parametrize("way", ["int8", "float8", "asymmetric"])
def test_a_checkpoint_that_transformers_saves_with_torchao(
    way: str, zoo: Any, tmp_path: Any
) -> None:
    """Read from its files and in memory, raw and processed, beside the values in float32."""
    pytest.importorskip("torchao")
    transformers: Any = importlib.import_module("transformers")
    folder = qz.build(zoo, "llama-gqa")
    load = transformers.AutoModelForCausalLM.from_pretrained
    config = transformers.TorchAoConfig(_torchao_config(way))
    hf = load(folder, quantization_config=config, dtype=torch.float32)
    hf.save_pretrained(tmp_path / "saved")
    dense = load(folder, dtype=torch.float32)
    for name, weight in hf.named_parameters():
        is_packed = type(weight).__module__.startswith("torchao.")
        dense.get_parameter(name).data.copy_(weight.dequantize() if is_packed else weight)
    with torch.no_grad():
        expected = dense(zoo_module.tokens("llama-gqa")).logits.log_softmax(-1)
    for flags in ({}, reference.NO_PROCESSING):
        for more in ({}, {"hf_model": hf}):
            model = lean_model(tmp_path / "saved", **flags, **more)
            assert len(qz.quantized_parameters(model)) == 7 * model.cfg.n_layers
            assert qz.gap(qz.log_probs(model, "llama-gqa"), expected) < 1e-4
