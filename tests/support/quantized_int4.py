"""Matrices packed into words of 32 bits by the definitions of GPTQ, AWQ and compressed-tensors, and
unpacked code by code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
Pack = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: torch.Tensor, bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """Codes [n, m] packed along the second dimension, the first into the lowest bits, or in another
    order in each word; [n, ceil(m * bits / 32)] int32.
    """
    per = 32 // bits
    order = order or range(per)
    given = codes.cpu().numpy().astype(np.uint64)
    filled = np.zeros((given.shape[0], -(-given.shape[1] // per) * per), dtype=np.uint64)
    filled[:, : given.shape[1]] = given
    packed = np.zeros((len(given), filled.shape[1] // per), dtype=np.uint64)
    for place, number in enumerate(order):
        packed |= filled[:, number::per] << np.uint64(bits * place)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def codes_of(
    packed: torch.Tensor, bits: int, count: int, order: Sequence[int] | None = None
) -> torch.Tensor:
    """The inverse of `words`: [n, count] int64."""
    per = 32 // bits
    places = list(order or range(per))
    made = torch.empty(len(packed), packed.shape[1] * per, dtype=torch.int64)
    unsigned = packed.to(torch.int64) & 0xFFFFFFFF
    for place, number in enumerate(places):
        made[:, number::per] = (unsigned >> (bits * place)) & ((1 << bits) - 1)
    return made[:, :count]


def quantized(
    matrix: torch.Tensor, bits: int, groups: torch.Tensor, symmetric: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [out, in], zero points and scales [out, groups] that are near a matrix.

    Args:
        groups: the group of each column.
        symmetric: whether the zero point is the middle of the codes.
    """
    top, count = (1 << bits) - 1, int(groups.max()) + 1
    parts = [matrix[:, groups == group] for group in range(count)]
    if symmetric:
        scales = torch.stack([part.abs().amax(1) for part in parts], 1) / (top // 2)
        zeros = torch.full_like(scales, (top + 1) // 2)
    else:
        low = torch.stack([part.amin(1) for part in parts], 1)
        high = torch.stack([part.amax(1) for part in parts], 1)
        scales = (high - low) / top
        zeros = (-low / scales).round()
    scales = scales.to(dtype)
    # A first version of GPTQ's format cannot store zero points of 0.
    zeros = zeros.clamp(1, top)
    codes = (matrix / scales.float()[:, groups] + zeros[:, groups]).round().clamp(0, top)
    return codes.long(), zeros.long(), scales


def values_of(
    codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """What codes [out, in] stand for, in float32."""
    return (codes - zeros[:, groups]).float() * scales.float()[:, groups]


def gptq(
    bits: int,
    size: int,
    *,
    version: int = 1,
    symmetric: bool = True,
    reordered: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Pack:
    """GPTQ's pieces; `reordered` columns have groups that are not side by side."""

    def pack(matrix: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        columns = matrix.shape[1]
        groups = torch.arange(columns) // (columns if size == -1 else size)
        if reordered:
            groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(3))]
        codes, zeros, scales = quantized(matrix, bits, groups, symmetric, dtype)
        pieces = {
            "qweight": words(codes, bits).T,
            "qzeros": words(zeros.T - int(version == 1), bits),
            "scales": scales.T,
            "g_idx": groups.to(torch.int32),
        }
        pieces = {name: piece.contiguous() for name, piece in pieces.items()}
        return pieces, values_of(codes, zeros, scales, groups)

    return pack


def awq(size: int, dtype: torch.dtype = torch.float16) -> Pack:
    """AWQ's pieces in the version "gemm"."""

    def pack(matrix: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        columns = matrix.shape[1]
        groups = torch.arange(columns) // (columns if size == -1 else size)
        codes, zeros, scales = quantized(matrix, 4, groups, False, dtype)
        pieces = {
            "qweight": words(codes.T, 4, AWQ_ORDER),
            "qzeros": words(zeros.T, 4, AWQ_ORDER),
            "scales": scales.T.contiguous(),
        }
        return pieces, values_of(codes, zeros, scales, groups)

    return pack


def compressed(
    bits: int,
    size: int,
    *,
    symmetric: bool = True,
    reordered: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Pack:
    """The pieces of compressed-tensors' pack-quantized; `size` -1 for a scale for each row."""

    def pack(matrix: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, columns = matrix.shape
        groups = torch.arange(columns) // (columns if size == -1 else size)
        if reordered:
            groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(3))]
        codes, zeros, scales = quantized(matrix, bits, groups, symmetric, dtype)
        pieces = {
            "weight_packed": words(codes, bits),
            "weight_scale": scales.contiguous(),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if reordered:
            pieces["weight_g_idx"] = groups.to(torch.int32)
        if not symmetric:
            pieces["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
        return pieces, values_of(codes, zeros, scales, groups)

    return pack


def gptq_config(bits: int, size: int, **more: Any) -> dict[str, Any]:
    """A `quantization_config` as AutoGPTQ writes it."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "desc_act": False,
        "sym": True,
        "damp_percent": 0.1,
        "true_sequential": True,
        **more,
    }


def compressed_config(bits: int, size: int, **weights: Any) -> dict[str, Any]:
    """A `quantization_config` as llm-compressor writes it for packed weights."""
    strategy = {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    described = {"num_bits": bits, "type": "int", "symmetric": True, **strategy, **weights}
    group = {"targets": ["Linear"], "weights": described, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def awq_config(size: int) -> dict[str, Any]:
    """A `quantization_config` as AutoAWQ writes it."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
