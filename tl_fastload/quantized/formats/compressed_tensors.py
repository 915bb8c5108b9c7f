"""The format of the compressed-tensors library: 8-bit floats and integers with scales, and integers
of 4 or 8 bits packed into words (`format` in the configuration).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tl_fastload.errors import ArgumentError, QuantizationError
from tl_fastload.quantized.formats.base import Format, QuantizedBytes, damaged, describe
from tl_fastload.quantized.formats.fp8 import (
    OF_ACTIVATIONS,
    ZeroPointSpec,
    as_block,
    codes_and_scales,
    rounded_besides,
    stored_zeros,
)
from tl_fastload.quantized.formats.packed_bytes import (
    PackedBytes,
    any_words,
    column_groups,
    needed,
    words_of,
)
from tl_fastload.quantized.formats.scaled_bytes import (
    FLOAT8,
    ScaledBytes,
    scaled_bytes,
    scaled_sample,
)
from tl_fastload.quantized.spec import Spec, modules_in, table_in, unreadable

_NAME = "compressed-tensors"
_FLOAT, _INT = f"{_NAME}-fp8", f"{_NAME}-int8"
_WORDS = {4: f"{_NAME}-packed4", 8: f"{_NAME}-packed8"}
_CODES = {_FLOAT: FLOAT8, _INT: frozenset({torch.int8})}
_KINDS = {"float": _FLOAT, "int": _INT}
_PACKED = "pack-quantized"
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", _PACKED)
_OF_SCHEMES = "num_bits type strategy symmetric group_size block_structure actorder".split()
_GROUPS_SAID = ("weight_g_idx", "actorder", "actorder: null", '"group"')
_NOT_HERE = (
    "nvfp4-pack-quantized mxfp4-pack-quantized mxfp6-pack-quantized mxfp8-quantized marlin-24 "
    "sparse-bitmask sparse-24-bitmask mixed-precision"
).split()


@dataclass(frozen=True)
class CompressedSpec(ZeroPointSpec):
    """How compressed-tensors stores codes with scales.

    Attributes:
        bits: of codes that are packed into words; None where each has a byte.
        is_reordered: whether `weight_g_idx` has the group of each column.
    """

    bits: int | None = None
    is_reordered: bool = False


class CompressedTensors(Format):
    """What llm-compressor quantizes to 8 or 4 bits, dequantized at use."""

    name = _NAME
    kinds = (_FLOAT, _INT, *_WORDS.values())
    stores = (ScaledBytes, PackedBytes)
    spec = CompressedSpec
    pieces: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (f".weight_{name}" for name in ("scale", "zero_point", "packed", "shape", "g_idx")),
        ".weight",
    )
    codes = FLOAT8 | {torch.int8}
    undeclared: ClassVar[Mapping[str, str]] = {
        "weight_packed": '{"quant_method": "compressed-tensors", "format": "pack-quantized", '
        '"config_groups": ...}, with the groups that the checkpoint was saved with'
    }
    remedy = 'pip install --upgrade "torch>=2.1"'
    ignored = OF_ACTIVATIONS | {".input_zero_point", ".output_zero_point"}

    def declared(self, fields: Mapping[str, Any]) -> Spec | None:
        if fields.get("quant_method") != _NAME:
            return None
        named = str(fields.get("format"))
        sparse = table_in(fields, "sparsity_config").get("format") or "dense"
        if named in _FORMATS and sparse != "dense":
            named = sparse
        if named in _NOT_HERE:
            raise unreadable(f"{_NAME} weights in the format {named!r}")
        return _spec_of(fields, named) if named in _FORMATS else None

    def assemble(self, pieces: Mapping[str, torch.Tensor], spec: Any) -> QuantizedBytes:
        if spec.bits is not None:
            return _packed_bytes(pieces, spec)
        beyond = sorted(pieces.keys() & {"weight_packed", "weight_g_idx"})
        if beyond:
            raise QuantizationError(
                f"{spec.kind} weights with {' and '.join(beyond)}, which only packed ones have. "
                "Correct quantization_config in config.json."
            )
        codes, scales = codes_and_scales(pieces, _CODES[spec.kind], spec.kind)
        zeros = stored_zeros(pieces, "weight_zero_point", spec.is_symmetric)
        return scaled_bytes(codes, scales, spec.block, spec.kind, zeros)

    def of_layer(self, module: Any) -> tuple[QuantizedBytes, torch.dtype | None] | None:
        status = getattr(module, "quantization_status", None)
        if getattr(status, "value", status) != "compressed":
            return None  # the library decompresses layers when the model runs first
        held = {**dict(module._parameters), **dict(module._buffers)}
        pieces = {
            name: part.detach()
            for name, part in held.items()
            if f".{name}" in self.pieces or name == "weight"
        }
        weights = module.quantization_scheme.weights
        fields = {name: getattr(weights, name, None) for name in _OF_SCHEMES}
        fields = {name: getattr(value, "value", value) for name, value in fields.items()}
        spec = _spec_of_group({"weights": fields}, (), False, "weight_packed" in pieces)
        return self.assemble(pieces, spec), None

    def sample(self, kind: str, device: torch.device) -> QuantizedBytes:
        bits = next((bits for bits, named in _WORDS.items() if named == kind), None)
        if bits is not None:
            scales = torch.linspace(0.1, 1, 64, device="cpu").view(64, 1).to(device)
            words = any_words(64, words_of(128, bits)).to(device)
            return PackedBytes(words, scales, (64, 128), bits, 128, kind)
        return scaled_sample("int8" if kind == _INT else "float8_e4m3fn", kind, device)


def _spec_of(fields: Mapping[str, Any], named: str) -> CompressedSpec:
    """The one way in which a configuration says that weights are quantized.

    Raises:
        ArgumentError: it says none, or contradicts itself.
        UnsupportedArchitectureError: several ways, or one that is not read.
    """
    groups = [group for group in table_in(fields, "config_groups").values() if group]
    if not groups or not all(isinstance(group, Mapping) for group in groups):
        raise ArgumentError(
            f"the quantization_config of {_NAME} describes no config_groups with weights. Restore "
            "config.json from the checkpoint's repository."
        )
    skip = modules_in(fields, "ignore")
    keeps = bool(fields.get("kv_cache_scheme"))
    specs = [_spec_of_group(group, skip, keeps, named == _PACKED) for group in groups]
    first = specs[0]
    if any(_ways(spec) != _ways(first) for spec in specs[1:]):
        ways = {
            spec.kind + (f" in blocks of {list(spec.block)}" if spec.block else "")
            for spec in specs
        }
        raise unreadable(f"{_NAME} weights quantized in several ways ({', '.join(sorted(ways))})")
    other = "int-quantized" if first.kind == _FLOAT else "float-quantized"
    if named == other:
        raise ArgumentError(
            f"the quantization_config says format {named!r} and describes {first.kind} weights, "
            "which contradict each other. Restore config.json from the checkpoint's repository."
        )
    return first


def _spec_of_group(
    group: Mapping[str, Any], skip: tuple[str, ...], rounds_cache: bool, is_packed: bool
) -> CompressedSpec:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise ArgumentError(f"a config group of {_NAME} describes no weights. Restore config.json.")
    bits = weights.get("num_bits", 8)
    kind = _KINDS.get(str(weights.get("type") or "int").lower())
    if is_packed:
        kind = _WORDS.get(bits) if kind == _INT and type(bits) is int else None
    if kind is None or (bits != 8 and not is_packed):
        raise unreadable(
            f"{_NAME} weights of {bits} bits and type {weights.get('type')!r}",
            "integers of 4 or 8 bits" if is_packed else "8-bit floats and integers",
        )
    strategy, block = weights.get("strategy"), None
    size = weights.get("group_size")
    if strategy == "block":
        block = as_block(_of_text(weights.get("block_structure")))
    elif strategy == "group" or (strategy is None and size is not None and size != -1):
        block = as_block([1, size])
    elif strategy not in (None, "tensor", "channel") or (strategy == "tensor" and is_packed):
        raise unreadable(f"{_NAME} weights with the strategy {strategy!r}")
    if is_packed and strategy == "block":
        raise unreadable(
            f"packed {_NAME} weights in blocks", "in groups or with a scale for each row"
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
        bits=bits if is_packed else None,
        is_reordered=str(weights.get("actorder") or "").lower() == "group",
    )


def _of_text(structure: Any) -> Any:
    """Early versions wrote a block structure as "128x128"."""
    if isinstance(structure, str) and structure.replace("x", "").isdigit():
        return [int(size) for size in structure.split("x")]
    return structure


def _ways(spec: CompressedSpec) -> tuple[Any, ...]:
    """What of a spec all groups of a checkpoint must have in common."""
    return (spec.kind, spec.block, spec.bits and (spec.is_symmetric, spec.is_reordered))


def _packed_bytes(pieces: Mapping[str, torch.Tensor], spec: CompressedSpec) -> PackedBytes:
    """The bytes of a matrix of packed codes.

    Raises:
        QuantizationError: pieces are missing, or do not fit each other.
    """
    words, scales = needed(pieces, ("weight_packed", "weight_scale"))
    zeros = stored_zeros(pieces, "weight_zero_point", spec.is_symmetric)
    bits = spec.bits or 8
    columns = words.shape[1] * 32 // bits
    size = columns if spec.block is None else spec.block[1]
    if scales.shape[1] * size < columns:
        columns = scales.shape[1] * size  # the last word is not full
    size, index = max(size, 1), pieces.get("weight_g_idx")
    was_ordered = index is not None and not index.is_meta and bool((index == -1).all())
    groups = None
    if not was_ordered:  # else there was nothing to reorder
        groups = column_groups(index, scales.shape[1], size, spec.is_reordered, _GROUPS_SAID)
    shape = pieces.get("weight_shape")
    found = (words.shape[0], columns)
    if shape is not None and not shape.is_meta and tuple(shape.tolist()) != found:
        raise damaged(
            f"weight_shape says {shape.tolist()}, and weight_packed {describe(words)} with "
            f"weight_scale {describe(scales)} are of {list(found)}"
        )
    return PackedBytes(words, scales, found, bits, size, spec.kind, zeros, groups=groups)
