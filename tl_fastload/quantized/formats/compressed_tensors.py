"""The format of the compressed-tensors library: 8-bit floats and integers with scales. Its other
formats (`format` in the configuration) each need an entry in `_KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tl_fastload.errors import ArgumentError, QuantizationError, UnsupportedArchitectureError
from tl_fastload.quantized.formats.base import Format, QuantizedBytes
from tl_fastload.quantized.formats.fp8 import (
    OF_ACTIVATIONS,
    ScaledSpec,
    as_block,
    codes_and_scales,
    rounded_besides,
)
from tl_fastload.quantized.formats.scaled_bytes import (
    FLOAT8,
    ScaledBytes,
    scaled_bytes,
    scaled_sample,
    stacked_again,
)
from tl_fastload.quantized.spec import Spec

_NAME = "compressed-tensors"
_FLOAT, _INT = f"{_NAME}-fp8", f"{_NAME}-int8"
_CODES = {_FLOAT: FLOAT8, _INT: frozenset({torch.int8})}
_KINDS = {"float": _FLOAT, "int": _INT}
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
_NOT_HERE = (
    "nvfp4-pack-quantized mxfp4-pack-quantized mxfp6-pack-quantized mxfp8-quantized marlin-24 "
    "sparse-bitmask sparse-24-bitmask mixed-precision"
).split()


@dataclass(frozen=True)
class CompressedSpec(ScaledSpec):
    """How compressed-tensors stores codes with scales.

    Attributes:
        is_symmetric: whether there are no zero points.
    """

    is_symmetric: bool = True


class CompressedTensors(Format):
    """What llm-compressor quantizes to 8 bits, dequantized at use."""

    name = _NAME
    kinds = (_FLOAT, _INT)
    stores = (ScaledBytes,)
    spec = CompressedSpec
    pieces: ClassVar[Mapping[str, str]] = {
        ".weight_scale": ".weight",
        ".weight_zero_point": ".weight",
    }
    codes = FLOAT8 | {torch.int8}
    remedy = 'pip install --upgrade "torch>=2.1"'
    ignored = OF_ACTIVATIONS | {".input_zero_point", ".output_zero_point", ".weight_g_idx"}

    def declared(self, fields: Mapping[str, Any]) -> Spec | None:
        method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))
        if method != _NAME:
            return None
        named = str(getattr(fields.get("format"), "value", fields.get("format")))
        sparse = (fields.get("sparsity_config") or {}).get("format") or "dense"
        if named in _FORMATS and sparse != "dense":
            named = sparse
        if named in _NOT_HERE:
            raise UnsupportedArchitectureError(
                f"{_NAME} weights in the format {named!r} cannot be read. Take the unquantized "
                "checkpoint, with quantize= if it is too large."
            )
        return _spec_of(fields, named) if named in _FORMATS else None

    def assemble(self, pieces: Mapping[str, torch.Tensor], spec: Any) -> QuantizedBytes:
        codes, scales = codes_and_scales(pieces, _CODES[spec.kind], spec.kind)
        zeros = pieces.get("weight_zero_point")
        if zeros is None and not spec.is_symmetric:
            raise QuantizationError(
                "an asymmetric weight without its zero points (weight_zero_point). Download the "
                "checkpoint again."
            )
        if spec.is_symmetric:
            zeros = None  # some versions store them: they are zero
        elif zeros is not None and zeros.dtype != torch.int8:
            raise QuantizationError(f"zero points are int8, not {zeros.dtype}.")
        return scaled_bytes(codes, scales, spec.block, spec.kind, zeros)

    def sample(self, kind: str, device: torch.device) -> QuantizedBytes:
        if kind == _FLOAT and not FLOAT8:
            raise QuantizationError("this torch has no 8-bit floats")
        return scaled_sample(torch.int8 if kind == _INT else torch.float8_e4m3fn, kind, device)

    def as_parameter(self, matrix: Any, pieces: Mapping[str, torch.Tensor]) -> Any:
        return stacked_again(matrix, codes_and_scales(pieces, self.codes, _NAME)[0])


def _spec_of(fields: Mapping[str, Any], named: str) -> CompressedSpec:
    """The one way in which a configuration says that weights are quantized.

    Raises:
        ArgumentError: it says none, or contradicts itself.
        UnsupportedArchitectureError: several ways, or one that is not read.
    """
    groups = [group for group in (fields.get("config_groups") or {}).values() if group]
    if not groups or not all(isinstance(group, Mapping) for group in groups):
        raise ArgumentError(
            f"the quantization_config of {_NAME} describes no config_groups with weights. Restore "
            "config.json from the checkpoint's repository."
        )
    skip = tuple(fields.get("ignore") or ())
    keeps = bool(fields.get("kv_cache_scheme"))
    specs = [_spec_of_group(group, skip, keeps) for group in groups]
    first = specs[0]
    if any((spec.kind, spec.block) != (first.kind, first.block) for spec in specs[1:]):
        raise UnsupportedArchitectureError(
            f"the {_NAME} checkpoint quantizes its weights in several ways "
            f"({', '.join(sorted({_words(spec) for spec in specs}))}), which cannot be read "
            "together. Take the unquantized checkpoint, with quantize= if it is too large."
        )
    other = "int-quantized" if first.kind == _FLOAT else "float-quantized"
    if named == other:
        raise ArgumentError(
            f"the quantization_config says format {named!r} and describes {first.kind} weights, "
            "which contradict each other. Restore config.json from the checkpoint's repository."
        )
    return first


def _spec_of_group(
    group: Mapping[str, Any], skip: tuple[str, ...], rounds_cache: bool
) -> CompressedSpec:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise ArgumentError(f"a config group of {_NAME} describes no weights. Restore config.json.")
    kind = _KINDS.get(str(weights.get("type") or "int").lower())
    if kind is None or weights.get("num_bits", 8) != 8:
        raise UnsupportedArchitectureError(
            f"{_NAME} weights of {weights.get('num_bits')} bits and type "
            f"{weights.get('type')!r} cannot be read in this format, only 8-bit floats and "
            "integers. Take the unquantized checkpoint, with quantize= if it is too large."
        )
    strategy, block = weights.get("strategy"), None
    size = weights.get("group_size")
    if strategy == "block":
        block = as_block(_of_text(weights.get("block_structure")))
    elif strategy == "group" or (strategy is None and size is not None and size != -1):
        block = as_block([1, size])
    elif strategy not in (None, "tensor", "channel"):
        raise UnsupportedArchitectureError(
            f"{_NAME} weights with the strategy {strategy!r} cannot be read. Take the unquantized "
            "checkpoint, with quantize= if it is too large."
        )
    if block is None and strategy == "block":
        raise ArgumentError("blocks without a block_structure in quantization_config.")
    inputs = group.get("input_activations")
    scales = None
    if isinstance(inputs, Mapping):
        scales = "dynamic" if inputs.get("dynamic") else "static"
    return CompressedSpec(
        kind,
        skip,
        None,
        block,
        rounds=rounded_besides(scales, rounds_cache),
        is_symmetric=bool(weights.get("symmetric", True)),
    )


def _of_text(structure: Any) -> Any:
    """Early versions wrote a block structure as "128x128"."""
    if isinstance(structure, str) and structure.replace("x", "").isdigit():
        return [int(size) for size in structure.split("x")]
    return structure


def _words(spec: CompressedSpec) -> str:
    return spec.kind if spec.block is None else f"{spec.kind} in blocks of {list(spec.block)}"
