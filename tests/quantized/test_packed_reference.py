"""Formats that are only read, against the libraries that define them: values bit for bit."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

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
