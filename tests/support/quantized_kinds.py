"""Every way to quantize that the tests of quantized tensors run on: real bitsandbytes, and formats
that are only read, packed by their definition.
"""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F

from tests.support import quantized_packed as packed
from tl_fastload import quantized
from tl_fastload.quantized import QuantizedTensor, formats
from tl_fastload.quantized.formats import bitsandbytes_kernels as kernels
from tl_fastload.quantized.formats.bitsandbytes_bytes import FourBitBytes, Int8Bytes

HEADS, D_HEAD, COLUMNS = 3, 8, 128
ROWS = HEADS * D_HEAD


def int8_bytes(layer: Any) -> Int8Bytes:
    """The bytes of an 8-bit layer or weight of bitsandbytes."""
    return Int8Bytes(*kernels.parts_of_linear8bit(layer))


def four_bit_bytes(layer: Any) -> FourBitBytes:
    """The bytes of a 4-bit layer or weight of bitsandbytes."""
    return FourBitBytes(**kernels.parts_of_linear4bit(layer))


@dataclass(frozen=True)
class Kind:
    """One way to quantize.

    Attributes:
        outliers: whether the activations have some.
        error: how far a product may lie from that of the dequantized weight, relative.
    """

    name: str
    kind: str
    double_quant: bool = False
    blocksize: int = 64
    dtype: torch.dtype = torch.float32
    outliers: bool = False
    error: float = 1e-6

    def layer(self, dense: torch.Tensor) -> Any:
        """bitsandbytes' own layer, quantized."""
        if self.kind == "int8":
            return layer_8bit(dense)
        return layer_4bit(dense, self.kind, self.double_quant, self.blocksize, self.dtype)

    def tensor(self, layer: Any) -> QuantizedTensor:
        if self.kind == "int8":
            return quantized.from_bytes(int8_bytes(layer), dtype=self.dtype)
        blocks, compute_dtype = four_bit_bytes(layer), layer.compute_dtype
        return quantized.from_bytes(blocks, dtype=self.dtype, compute_dtype=compute_dtype)

    def quantize(self, dense: torch.Tensor) -> QuantizedTensor:
        """What the package itself makes of a matrix."""
        return quantized.quantize(dense, self.kind)

    def make(self, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> QuantizedTensor:
        return self.tensor(self.layer(dense_matrix(rows, columns, seed)))

    def activations(self, *shape: int) -> torch.Tensor:
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        if self.outliers:
            x[..., 5] *= 30
        return x.to(self.dtype)


class Stored(torch.nn.Module):
    """The pieces of a weight, and the layer that they stand for."""

    def __init__(self, pieces: dict[str, torch.Tensor], values: torch.Tensor) -> None:
        super().__init__()
        self.values, self.bias = values, None
        self.main = next(
            (
                n
                for n in ("blocks", "qweight", "weight_packed", "_weight_qdata", "Q4_1")
                if n in pieces
            ),
            "weight",
        )
        for name, tensor in pieces.items():
            # Groups in order, and shapes, are not kept.
            is_kept = name != "weight_shape" and (name != "g_idx" or bool(tensor.diff().min() < 0))
            leaf = "weight" if name == self.main else name
            self.register_buffer(leaf, tensor, persistent=is_kept)

    def pieces(self) -> dict[str, torch.Tensor]:
        named = self.named_buffers()
        return {self.main if name == "weight" else name: part for name, part in named}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.values.to(x.dtype), self.bias)


@dataclass(frozen=True)
class PackedKind(Kind):
    """A way to quantize that is only read; `packing` is one of `quantized_packed.PACKINGS`."""

    packing: str = ""

    def layer(self, dense: torch.Tensor) -> Stored:
        return Stored(*packed.PACKINGS[self.packing].pack(dense))

    def tensor(self, layer: Stored) -> QuantizedTensor:
        format = formats.of_kind(self.kind)
        spec = format.declared(packed.PACKINGS[self.packing].declared)
        pieces = layer.pieces()
        if self.kind == "mxfp4":
            scales = pieces["scales"][None]
            blocks = pieces["blocks"].view(*scales.shape, -1)
            pieces = {"down_proj_blocks": blocks, "down_proj_scales": scales}
        return quantized.from_bytes(format.assemble(pieces, spec), dtype=self.dtype)

    def quantize(self, dense: torch.Tensor) -> QuantizedTensor:
        return self.tensor(self.layer(dense))


def _packed() -> list[Kind]:
    errors = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
    ways = [
        ("fp8-ends", torch.float32),
        ("fp8-powers", torch.bfloat16),
        ("fp8-tensor", torch.float16),
        ("ct-rows", torch.float32),
        ("ct-int-groups", torch.float32),
        ("mxfp4", torch.float32),
        ("gptq", torch.float16),
        ("gptq-reordered", torch.float32),
        ("gptq-8bit", torch.bfloat16),
        ("awq", torch.float32),
        ("packed", torch.bfloat16),
        ("packed-zeros", torch.float32),
        ("torchao", torch.bfloat16),
        ("torchao-groups", torch.float32),
        *[("gguf", torch.float32)] * ("gguf" in packed.PACKINGS),
    ]
    return [
        PackedKind(
            f"{name}-{str(dtype)[6:]}",
            packed.kind_of(name),
            dtype=dtype,
            error=errors[dtype],
            packing=name,
        )
        for name, dtype in ways
    ]


def _four_bit() -> list[Kind]:
    errors = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
    return [
        Kind(
            f"{kind}-{'double-' if double else ''}{size}-{str(dtype)[6:]}",
            kind,
            double,
            size,
            dtype,
            error=error,
        )
        for kind, double, size, (dtype, error) in itertools.product(
            ("nf4", "fp4"), (False, True), (64, 128), errors.items()
        )
        # Any two of these with each other, not all three.
        if ((kind == "fp4") + double + (size == 128)) % 2 == 0
    ]


KINDS = [
    Kind("int8", "int8", error=2e-2),
    Kind("int8-outliers", "int8", outliers=True, error=2e-2),
    Kind("int8-float16", "int8", dtype=torch.float16, error=2e-2),
    Kind("int8-bfloat16-outliers", "int8", dtype=torch.bfloat16, outliers=True, error=2e-2),
    *_four_bit(),
    *_packed(),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
# Tests of bookkeeping, which no dtype or block size changes.
some_kinds = pytest.mark.parametrize(
    "kind",
    [KINDS[0], *_four_bit()[::3], *(k for k in _packed() if k.dtype == torch.float32)],
    ids=lambda kind: kind.name,
)


def dense_matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) / columns**0.5


def is_bytes(tensor: Any) -> bool:
    return isinstance(tensor, QuantizedTensor)


def assert_near(found: torch.Tensor, expected: torch.Tensor, error: float) -> None:
    gap, size = (found.double() - expected.double()).norm(), expected.double().norm()
    assert gap <= error * size, (float(gap), float(size))  # both are zero where nothing is left


def layer_8bit(dense: torch.Tensor, threshold: float = 6.0, bias: bool = False) -> Any:
    """A quantized `Linear8bitLt` in evaluation mode, as transformers makes it."""
    layer = bnb.nn.Linear8bitLt(
        dense.shape[1], dense.shape[0], bias, has_fp16_weights=False, threshold=threshold
    )
    layer.weight = bnb.nn.Int8Params(dense.clone(), requires_grad=False)
    return layer.to("cpu").eval().requires_grad_(False)


def layer_4bit(
    dense: torch.Tensor,
    kind: str = "nf4",
    double_quant: bool = False,
    blocksize: int = 64,
    compute_dtype: Any = None,
    bias: bool = False,
    avx512: bool = False,
) -> Any:
    """A quantized `Linear4bit` in evaluation mode, with or without the bfloat16 shortcut."""
    layer = bnb.nn.Linear4bit(dense.shape[1], dense.shape[0], bias, compute_dtype)
    layer.weight = bnb.nn.Params4bit(
        dense.clone(),
        requires_grad=False,
        blocksize=blocksize,
        compress_statistics=double_quant,
        quant_type=kind,
        module=layer,
    )
    if not avx512:
        layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu").eval().requires_grad_(False)


def save_and_load(value: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    if not weights_only or not hasattr(torch.serialization, "safe_globals"):
        return torch.load(file, weights_only=False)
    with torch.serialization.safe_globals([quantized.rebuild]):
        return torch.load(file, weights_only=True)
