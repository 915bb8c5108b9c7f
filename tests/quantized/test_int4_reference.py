"""GPTQ, AWQ and packed weights of compressed-tensors against the libraries that define them: what
these write is read here and by themselves, bit for bit in the dtype that they compute in.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from tests.support import quantized_int4 as int4
from tests.support.quantized_kinds import dense_matrix
from tl_fastload.quantized import formats

ROWS, COLUMNS = 96, 256


def _ours(declared: dict[str, Any], pieces: dict[str, torch.Tensor]) -> Any:
    spec = next(s for f in formats.FORMATS if (s := f.declared(declared)) is not None)
    return formats.of_kind(spec.kind).assemble(pieces, spec)


def _scales_and_zeros(
    matrix: torch.Tensor, bits: int, groups: torch.Tensor, symmetric: bool
) -> Any:
    """As `int4` makes them, [out, groups]; zero points from 1 on."""
    return int4.quantized(matrix, bits, groups, symmetric, torch.float16)[1:]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "size"), [(2, 32), (4, 128), (4, -1), (8, 64)])
def test_gptqmodel(bits: int, size: int, symmetric: bool, reordered: bool, version: int) -> None:
    """Its own packing of a layer, and its `TorchLinear`'s values in float16."""
    torch_linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    model: Any = importlib.import_module("gptqmodel.utils.model")
    matrix = dense_matrix(ROWS, COLUMNS)
    real = COLUMNS if size == -1 else size
    groups = torch.arange(COLUMNS) // real
    if reordered:
        groups = groups[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))]
    zeros, scales = _scales_and_zeros(matrix, bits, groups, symmetric)
    layer = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    layer.weight.data = matrix
    theirs = torch_linear(bits, real, symmetric, reordered, COLUMNS, ROWS, register_buffers=True)
    theirs.pack(layer, scales.float(), zeros.float(), groups.to(torch.int32))
    theirs.eval()
    expected = theirs.dequantize_weight().T
    if version == 1:
        config: Any = importlib.import_module("gptqmodel.quantization.config").QuantizeConfig(bits)
        theirs.qzeros = theirs.qzeros.clone()
        model.convert_gptq_v2_to_v1_format_module(theirs, config)
    stored = {name: getattr(theirs, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    declared = int4.gptq_config(bits, size, desc_act=reordered)
    declared["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    ours = _ours(declared, stored)
    assert expected.dtype == torch.float16
    assert torch.equal(ours.dense(torch.float16), expected)
    assert torch.equal(ours.dense(torch.float32).half(), expected)
    assert (expected.float() - matrix).norm() < matrix.norm()  # it was this matrix


@pytest.mark.parametrize("size", [32, 128, -1])
def test_awq_of_gptqmodel(size: int) -> None:
    packing: Any = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils")
    matrix = dense_matrix(ROWS, COLUMNS)
    real = COLUMNS if size == -1 else size
    groups = torch.arange(COLUMNS) // real
    codes, zeros, scales = int4.quantized(matrix, 4, groups, False, torch.float16)
    words, zero_words = packing.pack_awq(codes.T.int(), zeros.T.int(), 4)
    stored = {"qweight": words, "qzeros": zero_words, "scales": scales.T.contiguous()}
    expected = packing.dequantize_gemm(words, zero_words, stored["scales"], 4, real).T
    ours = _ours(int4.awq_config(size), stored)
    assert expected.dtype == torch.float16
    assert torch.equal(ours.dense(torch.float16), expected)
    assert (expected.float() - matrix).norm() < matrix.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "size", "columns"), [(4, 32, 256), (4, -1, 256), (8, 64, 256), (4, 20, 100)]
)
def test_what_the_compressed_tensors_library_packs(
    bits: int, size: int, columns: int, symmetric: bool, dtype: torch.dtype
) -> None:
    """Also rows that end inside a word."""
    pytest.importorskip("compressed_tensors")
    schemes: Any = importlib.import_module("compressed_tensors.quantization")
    compressors: Any = importlib.import_module("compressed_tensors.compressors")
    matrix = dense_matrix(ROWS, columns).to(dtype)
    declared = int4.compressed_config(bits, size, symmetric=symmetric)
    weights = declared["config_groups"]["group_0"]["weights"]
    scheme = schemes.QuantizationScheme(
        targets=["Linear"], weights=schemes.QuantizationArgs(**weights)
    )
    groups = torch.arange(columns) // (columns if size == -1 else size)
    _, zeros, scales = int4.quantized(matrix.float(), bits, groups, symmetric, dtype)
    state = {"weight": matrix, "weight_scale": scales}
    if not symmetric:
        state["weight_zero_point"] = (zeros - (1 << bits - 1)).to(torch.int8)
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    ours = _ours(declared, stored)
    assert expected.dtype == dtype
    assert torch.equal(ours.dense(dtype), expected)
    assert (expected.float() - matrix.float()).norm() < matrix.float().norm()
