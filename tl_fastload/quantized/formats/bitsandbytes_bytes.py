"""The bytes of a matrix that bitsandbytes quantized: int8 rows, or packed 4-bit blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from tl_fastload.errors import QuantizationError
from tl_fastload.quantized.formats import bitsandbytes_kernels as kernels
from tl_fastload.quantized.formats.base import QuantizedBytes, describe, runs_of, take

# The sizes of the groups of doubly quantized scales that bitsandbytes can expand, largest first.
_NESTED_BLOCKSIZES = (256, 128, 64)


@dataclass(frozen=True, eq=False)
class Int8Bytes(QuantizedBytes):
    """int8 rows: the matrix is `codes * scales[:, None] / 127`.

    Attributes:
        codes: [out, in] int8.
        scales: [out] float32, the largest magnitude of each row (bitsandbytes' SCB).
        threshold: activations from here on are outliers, whose columns are multiplied unquantized;
            0 for none.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    threshold: float = 6.0

    tag = kind = "int8"
    rounds_activations: ClassVar[bool] = True

    @classmethod
    def quantize(cls, dense: torch.Tensor, threshold: float = 6.0) -> Int8Bytes:
        """Quantize a matrix byte for byte as bitsandbytes does.

        Raises:
            QuantizationError: values beyond float16; no bitsandbytes or no kernel.
        """
        if dense.is_meta:
            return cls(_empty(*dense.shape, dtype=torch.int8), _empty(len(dense)), threshold)
        return cls(*kernels.quantize_int8(dense), threshold)

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int8 or self.codes.dim() != 2:
            raise QuantizationError(
                f"8-bit weights must be a matrix of int8, not {describe(self.codes)}."
            )
        if self.scales.dtype != torch.float32 or self.scales.shape != self.codes.shape[:1]:
            raise QuantizationError(
                f"8-bit weights {describe(self.codes)} need one float32 scale (SCB) per row, "
                f"{self.codes.shape[0]} in all, not {describe(self.scales)}."
            )

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return (self.codes.shape[0], self.codes.shape[1])

    def rows(self, index: torch.Tensor) -> Int8Bytes:
        runs = runs_of(index)
        return replace(self, codes=take(self.codes, runs), scales=take(self.scales, runs))

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        # bitsandbytes' own numbers, by the steps of its `int8_vectorwise_dequant`.
        return (self.codes * self.scales.view(-1, 1) * 7.874015718698502e-3).to(dtype)  # 1 / 127

    def linear(self, x: Any, bias: Any = None, compute_dtype: Any = None) -> torch.Tensor:
        """As the base says; the kernel rounds x to float16."""
        return _by_rows(kernels.linear_int8, self, x, bias)

    def requantize(self, dense: torch.Tensor) -> Int8Bytes:
        return Int8Bytes.quantize(dense, self.threshold)


@dataclass(frozen=True, eq=False)
class FourBitBytes(QuantizedBytes):
    """Packed 4-bit blocks: value number i is `code[nibble i] * absmax[i // blocksize]`, rows one
    after the other.

    With double quantization, `absmax` is uint8 itself, and stands for
    `nested_code[absmax[j]] * nested_absmax[j // nested_blocksize] + nested_offset`.

    Attributes:
        packed: [n, 1] uint8, two values each, the first in the high half.
        absmax: [blocks] float32, or uint8 if doubly quantized.
        code: [16] float32.
        shape: (out, in) of the matrix.
        blocksize: values per block.
        quant_type: "nf4" or "fp4".
        quant_dtype: dtype of the matrix that was quantized.
        nested_absmax: [groups] float32, or None.
        nested_code: [256] float32, or None.
        nested_offset: [] float32, or None.
        nested_blocksize: blocks per group.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    shape: tuple[int, int]
    blocksize: int
    quant_type: str
    quant_dtype: torch.dtype
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None
    nested_blocksize: int = 256

    tag: ClassVar[str] = "4bit"

    @classmethod
    def quantize(
        cls, dense: torch.Tensor, kind: str, blocksize: int = 64, double_quant: bool = False
    ) -> FourBitBytes:
        """Quantize a matrix byte for byte as bitsandbytes does.

        Args:
            dense: [out, in], floating point.
            kind: "nf4" or "fp4".
            blocksize: values per block.
            double_quant: whether to quantize the scales too.

        Raises:
            QuantizationError: a block size that bitsandbytes has not; no bitsandbytes or no kernel.
        """
        if not dense.is_meta:
            return cls(**kernels.quantize_4bit(dense, kind, blocksize, double_quant))
        blocks = -(-dense.numel() // blocksize)
        groups = -(-blocks // _NESTED_BLOCKSIZES[0])
        sizes = {"nested_absmax": [groups], "nested_code": [256], "nested_offset": []}
        nested: dict[str, Any] = {
            name: _empty(*size) for name, size in sizes.items() if double_quant
        }
        return cls(
            packed=_empty(-(-dense.numel() // 2), 1, dtype=torch.uint8),
            absmax=_empty(blocks, dtype=torch.uint8 if double_quant else torch.float32),
            code=_empty(16),
            shape=(dense.shape[0], dense.shape[1]),
            blocksize=blocksize,
            quant_type=kind,
            quant_dtype=torch.float32,
            **nested,
        )

    def __post_init__(self) -> None:
        if self.quant_type not in ("nf4", "fp4"):
            raise QuantizationError(f"4-bit weights are 'nf4' or 'fp4', not {self.quant_type!r}.")
        if self.blocksize < 2 or self.blocksize % 2:
            raise QuantizationError(f"{self.blocksize} is not a block size of 4-bit weights.")
        size = self.shape[0] * self.shape[1]
        blocks = -(-size // self.blocksize)
        wanted = {"packed": -(-size // 2), "code": 16, "absmax": blocks}
        if self.is_nested:
            groups = -(-blocks // self.nested_blocksize)
            wanted |= {"nested_absmax": groups, "nested_code": 256, "nested_offset": 1}
        for name, count in wanted.items():
            is_byte = name == "packed" or (name == "absmax" and self.is_nested)
            dtype = torch.uint8 if is_byte else torch.float32
            part: torch.Tensor | None = getattr(self, name)
            if part is None or part.dtype != dtype or part.numel() != count:
                raise QuantizationError(
                    f"4-bit weights of a {list(self.shape)} matrix in blocks of {self.blocksize} "
                    f"need {count} x {dtype} as {name}, not {describe(part)}."
                )

    @property
    def is_nested(self) -> bool:
        """Whether the scales are quantized too."""
        return self.nested_absmax is not None or self.absmax.dtype == torch.uint8

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.quant_type

    @property
    def default_dtype(self) -> torch.dtype:
        return self.quant_dtype

    def block_scales(self) -> torch.Tensor:
        """The scale of each block, [blocks] float32: bitsandbytes' own numbers, bit for bit."""
        if self.nested_absmax is None or self.nested_code is None or self.nested_offset is None:
            return self.absmax
        groups = self.nested_absmax.repeat_interleave(self.nested_blocksize)[: self.absmax.numel()]
        return self.nested_code[self.absmax.int()] * groups + self.nested_offset

    def rows(self, index: torch.Tensor) -> FourBitBytes:
        width = self.shape[1]
        values = [(start * width, stop * width) for start, stop in runs_of(index)]
        size = self.shape[0] * width
        # Only the last block of the whole matrix may be a short one, and only at the end of the
        # result.
        whole = all(
            start % self.blocksize == 0
            and (stop % self.blocksize == 0 or (stop == size and i == len(values) - 1))
            for i, (start, stop) in enumerate(values)
        )
        if not whole:
            raise QuantizationError(
                f"a row of {width} values is not a whole number of blocks of {self.blocksize}, so "
                "these rows share blocks with others"
            )
        taken = self._with_scales(
            [(start // self.blocksize, -(-stop // self.blocksize)) for start, stop in values]
        )
        halves = [(start // 2, -(-stop // 2)) for start, stop in values]
        return replace(self, packed=take(self.packed, halves), shape=(len(index), width), **taken)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        if self.packed.is_meta:
            return _empty(*self.shape, dtype=dtype)
        return kernels.dequantize_4bit(self, dtype)

    def linear(self, x: Any, bias: Any = None, compute_dtype: Any = None) -> torch.Tensor:
        return _by_rows(kernels.linear_4bit, self, x, bias, compute_dtype)

    def requantize(self, dense: torch.Tensor) -> FourBitBytes:
        is_nested = self.nested_absmax is not None
        return FourBitBytes.quantize(dense, self.quant_type, self.blocksize, is_nested)

    def _with_scales(self, blocks: list[tuple[int, int]]) -> dict[str, Any]:
        """The fields that hold the scales of some runs of blocks."""
        if self.nested_absmax is None:
            return {"absmax": take(self.absmax, blocks)}
        edges = [n for run in blocks for n in run][:-1]
        for group in _NESTED_BLOCKSIZES:
            if self.nested_blocksize % group == 0 and all(edge % group == 0 for edge in edges):
                per = self.nested_blocksize // group
                finer = (
                    self.nested_absmax if per == 1 else self.nested_absmax.repeat_interleave(per)
                )
                groups = [(start // group, -(-stop // group)) for start, stop in blocks]
                return {
                    "absmax": take(self.absmax, blocks),
                    "nested_absmax": take(finer, groups),
                    "nested_blocksize": group,
                }
        # Rows that start inside a group of scales: keep the scales themselves, which are the same
        # numbers.
        scales = take(self.block_scales(), blocks)
        return {"absmax": scales, "nested_absmax": None, "nested_code": None, "nested_offset": None}


def _empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _by_rows(
    product: Callable[..., torch.Tensor],
    stored: QuantizedBytes,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    *more: Any,
) -> torch.Tensor:
    """A kernel's product of activations [..., in], which it wants as a matrix with rows."""
    if x.numel() == 0:
        # Nothing to multiply (an expert without tokens), but still a node of the graph.
        empty = x.sum(-1, keepdim=True).expand(*x.shape[:-1], stored.shape[0])
        return empty if bias is None else empty + bias.to(x.dtype)
    made = product(stored, x.reshape(-1, x.shape[-1]), bias, *more)
    return made.reshape(*x.shape[:-1], stored.shape[0])
