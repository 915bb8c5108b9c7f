"""Which parameters become quantized tensors, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.quantized_kinds import dense_matrix
from tl_fastload import quantized
from tl_fastload.hooked.names import role
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.quantized.formats.bitsandbytes import BitsAndBytesSpec
from tl_fastload.quantized.quantizer import Quantizer
from tl_fastload.quantized.recipes import QuantizedSource
from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise

CPU = torch.device("cpu")
HEADS, D_HEAD, D_MODEL = 3, 32, 128


def _dense(*shape: int, name: str = "x") -> tuple[torch.Tensor, Promise]:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(*shape, generator=generator)
    return tensor, Promise.of(MemorySource(tensor, name))


def _quantized(rows: int, columns: int, kind: str = "int8") -> tuple[QuantizedTensor, Any]:
    tensor = quantized.quantize(dense_matrix(rows, columns), kind)
    return tensor, Promise.of(QuantizedSource.of(tensor, "w"))


SHAPES = {
    "blocks.0.attn.W_Q": ((HEADS, D_MODEL, D_HEAD), (HEADS * D_HEAD, D_MODEL)),
    "blocks.0.attn._W_K": ((1, D_MODEL, D_HEAD), (D_HEAD, D_MODEL)),
    "blocks.0.attn.W_O": ((HEADS, D_HEAD, D_MODEL), (D_MODEL, HEADS * D_HEAD)),
    "blocks.0.mlp.W_in": ((D_MODEL, 192), (192, D_MODEL)),
    "blocks.0.mlp.W_gate": ((D_MODEL, 192), (192, D_MODEL)),
    "blocks.0.mlp.W_out": ((192, D_MODEL), (D_MODEL, 192)),
    "blocks.0.mlp.experts.1.W_in.weight": ((192, D_MODEL), (192, D_MODEL)),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_projections_are_quantized_as_matrices(name: str, kind: str) -> None:
    shape, matrix = SHAPES[name]
    blocksize = 32 if "W_O" in name else 64
    tensor, promise = _dense(*shape)
    quantizer = Quantizer(BitsAndBytesSpec(kind, blocksize=blocksize), role)
    assert quantizer.keep(name, promise, torch.float32, CPU) is None
    made = quantizer.quantize(name, tensor)
    assert made is not None
    assert made.shape == tensor.shape
    assert made.content.stored.shape == matrix
    assert made.why_dense() is None
    error = (made.dequantize() - tensor).norm() / tensor.norm()
    assert 0 < error < (0.01 if kind == "int8" else 0.2)
    assert quantizer.not_quantized == {}
    outline = quantizer.quantize(name, tensor.to("meta"))
    assert outline is not None
    assert outline.nbytes_stored() == made.nbytes_stored()
    assert (outline.shape, outline.stride()) == (made.shape, made.stride())


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("embed.W_E", (50, 64), "embedding: not a projection"),
        ("pos_embed.W_pos", (50, 64), "position embedding: not a projection"),
        ("unembed.W_U", (64, 50), "unembedding: not a projection"),
        ("blocks.0.mlp.W_gate.weight", (3, 64), "router: not a projection"),
        ("blocks.0.mlp.W_in", (66, 64), "a row of 66 is not a whole number of blocks of 64"),
        ("blocks.0.mlp.W_out", (64, 64), "skipped, as the configuration asks"),
    ],
)
def test_what_stays_dense_is_told(name: str, shape: tuple[int, ...], reason: str) -> None:
    tensor, promise = _dense(*shape)
    quantizer = Quantizer(BitsAndBytesSpec("nf4", skip=("W_out",)), role)
    assert quantizer.stays_dense(name, promise)
    assert quantizer.keep(name, promise, torch.float32, CPU) is None
    assert quantizer.quantize(name, tensor) is None
    assert quantizer.not_quantized == {name: reason}


@pytest.mark.parametrize(
    ("name", "shape"),
    [("blocks.0.attn.b_Q", (3, 8)), ("blocks.0.ln1.w", (64,)), ("blocks.0.attn._b_K", (3, 8))],
)
def test_what_is_no_matrix_is_not_told(name: str, shape: tuple[int, ...]) -> None:
    tensor, promise = _dense(*shape)
    for spec in (None, BitsAndBytesSpec("int8")):
        quantizer = Quantizer(spec, role)
        assert quantizer.stays_dense(name, promise)
        assert quantizer.quantize(name, tensor) is None
        assert quantizer.not_quantized == {}


def test_skipped_by_the_name_in_the_checkpoint() -> None:
    tensor, promise = _dense(64, 64, name="model.layers.0.mlp.down_proj.weight")
    for skip in ("down_proj", "mlp.down_proj", "model.layers.0"):
        quantizer = Quantizer(BitsAndBytesSpec("int8", skip=(skip,)), role)
        assert quantizer.stays_dense("blocks.0.mlp.W_out", promise.t())  # type: ignore[arg-type]
        assert quantizer.quantize("blocks.0.mlp.W_out", tensor.t()) is None
    quantizer = Quantizer(BitsAndBytesSpec("int8", skip=("down", "proj")), role)
    assert not quantizer.stays_dense("blocks.0.mlp.W_out", promise.t())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_bytes_are_kept(kind: str) -> None:
    tensor, promise = _quantized(192, D_MODEL, kind)
    quantizer = Quantizer(None, role)
    kept = quantizer.keep("blocks.0.mlp.W_in", promise.t(), torch.bfloat16, CPU)
    assert kept is not None
    assert kept.dtype == torch.bfloat16
    assert kept.shape == (D_MODEL, 192)
    for name, part in tensor.content.stored.tensors().items():
        assert kept.content.stored.tensors()[name].data_ptr() == part.data_ptr()
    assert quantizer.not_quantized == {}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_shift_is_for_kernels_that_round_activations(kind: str) -> None:
    _, promise = _quantized(192, D_MODEL, kind)
    bias, shift = _dense(D_MODEL)
    quantizer = Quantizer(None, role, {"blocks.0.mlp.W_in": shift})
    kept = quantizer.keep("blocks.0.mlp.W_in", promise.t(), torch.float32, CPU)
    assert kept is not None
    assert (kept.content.in_shift is None) == (kind == "nf4")
    if kind == "int8":
        assert torch.equal(kept.content.in_shift, bias)
    x = dense_matrix(5, D_MODEL, seed=3)
    torch.testing.assert_close(x @ kept, x @ kept.dequantize(), rtol=0.05, atol=0.05)


def test_what_bytes_cannot_follow_is_dense_and_told() -> None:
    _, promise = _quantized(192, D_MODEL)
    name = "blocks.0.mlp.W_in"
    quantizer = Quantizer(None, role)
    assert quantizer.keep(name, promise.t() + 1, torch.float32, CPU) is None
    assert "needs its values" in quantizer.not_quantized[name]
    assert not quantizer.stays_dense(name, promise.t())  # type: ignore[arg-type]
    dense = _dense(D_MODEL, 192)[1]
    assert quantizer.keep("blocks.1.mlp.W_in", dense, torch.float32, CPU) is None
    assert quantizer.not_quantized["blocks.1.mlp.W_in"] == "not quantized in the checkpoint"
