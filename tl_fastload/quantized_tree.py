"""Promises for quantized weights: of a loaded transformers model, or of a saved checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tl_fastload import quantized, quantized_checkpoint
from tl_fastload.errors import QuantizationError
from tl_fastload.promise import Promise
from tl_fastload.quantization import Quantization
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.quantized_recipes import QuantizedSource
from tl_fastload.reader import FileSource
from tl_fastload.recipe import SourceView

_ROWS = "Int8Params"
_BLOCKS = "Params4bit"

_AS_SAVED = "the one that the checkpoint was saved with"
_BNB = '{"quant_method": "bitsandbytes", '
_DECLARED_BY = {
    "SCB": _BNB + '"load_in_8bit": true}',
    "weight.quant_state.bitsandbytes__nf4": _BNB
    + '"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}',
    "weight.quant_state.bitsandbytes__fp4": _BNB
    + '"load_in_4bit": true, "bnb_4bit_quant_type": "fp4"}',
    **dict.fromkeys(("qweight", "weight_scale", "weight_scale_inv"), _AS_SAVED),
}
"""Pieces that only quantized weights have -> the configuration that they need."""


def promise_of_layer(module: nn.Module, name: str, dtype: torch.dtype) -> Promise | None:
    """A promise of the weight of a bitsandbytes layer in memory, sharing its bytes; None for
    others.

    Args:
        module: any module of a transformers model.
        name: of the weight, for messages.
        dtype: what the promise computes in.
    """
    kind = type(module._parameters.get("weight")).__name__
    if kind not in (_ROWS, _BLOCKS):
        return None
    make = quantized.from_linear8bit if kind == _ROWS else quantized.from_params4bit
    tensor = make(module, dtype=dtype)
    promise = _promise(tensor, name)
    if is_conv1d(getattr(module, "source_cls", None)):
        # transformers turns GPT-2's Conv1D into a linear layer when it quantizes, and transposes
        # it.
        promise = promise.t()  # type: ignore[assignment]
    return promise


def spec_of_layers(model: Any) -> Quantization | None:
    """How bitsandbytes' layers of a model in memory are quantized, which its configuration need not
    say if they were put there by hand; None without such layers.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        weight: Any = module._parameters.get("weight")
        if type(weight).__name__ == _ROWS:
            return Quantization("int8")
        if type(weight).__name__ == _BLOCKS:
            return Quantization(weight.quant_type)
    return None


def is_conv1d(cls: Any) -> bool:
    """Whether a class is transformers' `Conv1D`, whose weight is [in, out]."""
    return getattr(cls, "__name__", "") == "Conv1D"


def refuse_undeclared(promises: Mapping[str, Promise]) -> None:
    """Check that no weight of a checkpoint is quantized, which declares none to be.

    Raises:
        QuantizationError: some are; says what the configuration lacks.
    """
    pieces = {
        name: fields
        for name in promises
        for piece, fields in _DECLARED_BY.items()
        if name.endswith("." + piece)
    }
    codes = {
        name: _AS_SAVED
        for name, promise in promises.items()
        if name.endswith(".weight") and promise.dtype in (torch.int8, torch.uint8)
    }
    for name, fields in {**pieces, **codes}.items():
        raise QuantizationError(
            f"{name} ({promises[name].dtype}) belongs to quantized weights, but config.json has no "
            f"quantization_config. Add it again: {fields}."
        )


def combine(
    promises: Mapping[str, Promise], spec: Quantization, dtype: torch.dtype
) -> dict[str, Promise]:
    """Replace the pieces of each quantized weight of a checkpoint by one promise of the matrix.

    Args:
        promises: by checkpoint name; quantized weights come in several pieces.
        spec: the quantization that the checkpoint declares.
        dtype: what the weights compute in.

    Raises:
        QuantizationError: pieces are missing or misshapen, or not of the kind that is declared.
            No weight has been read then, only shapes.
    """
    pieces: dict[str, dict[str, Promise]] = {}
    for name, promise in promises.items():
        for part in (*quantized_checkpoint.INT8_PARTS, *quantized_checkpoint.FOUR_BIT_PARTS):
            if name.endswith("." + part):
                pieces.setdefault(name[: -len(part) - 1], {})[part] = promise
    for name, promise in promises.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and (layer in pieces or promise.dtype in (torch.int8, torch.uint8)):
            pieces.setdefault(layer, {})["weight"] = promise
    combined = {name: promise for name, promise in promises.items() if not _is_piece(name, pieces)}
    if not pieces:
        raise QuantizationError(
            f"the configuration declares {spec.kind} weights, but the checkpoint has none that are "
            "quantized. Remove quantization_config from config.json, and use quantize= to quantize."
        )
    for layer, parts in pieces.items():
        combined[f"{layer}.weight"] = _promise_of_pieces(layer, parts, spec, dtype)
    return combined


def _is_piece(name: str, pieces: Mapping[str, Mapping[str, Promise]]) -> bool:
    return any(
        name == f"{layer}.{part}" for layer in _parents(name) for part in pieces.get(layer, ())
    )


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def _promise_of_pieces(
    layer: str, parts: Mapping[str, Promise], spec: Quantization, dtype: torch.dtype
) -> Promise:
    def load() -> QuantizedTensor:
        tensors = {part: _values(promise) for part, promise in parts.items()}
        stored = quantized_checkpoint.read(tensors, name=layer, threshold=spec.threshold)
        return quantized.from_bytes(stored, dtype=dtype, compute_dtype=spec.compute_dtype)

    outlines = {part: _outline(part, promise) for part, promise in parts.items()}
    outline = quantized_checkpoint.read(outlines, name=layer)
    if outline.kind != spec.kind:
        raise QuantizationError(
            f"{layer} holds {outline.kind} weights, but the configuration declares {spec.kind}. "
            "Correct quantization_config in config.json."
        )
    home = _home(parts["weight"])
    name = f"{layer}.weight"
    return Promise.of(QuantizedSource(load, outline.shape, dtype, name, outline, home))


def _home(promise: Promise) -> torch.device | None:
    """Where a stored tensor lies: on the CPU, too, if its file is mapped; None if it is read."""
    node = promise.node
    if not isinstance(node, SourceView):
        return None
    if isinstance(node.source, FileSource):
        return torch.device("cpu") if node.source.is_mapped() else None
    return promise.device


def _outline(part: str, promise: Promise) -> torch.Tensor:
    """The shape and dtype of a piece; the values of those that say what the others are."""
    if part in quantized_checkpoint.DESCRIPTIONS:
        return _values(promise)
    return torch.empty(promise.shape, dtype=promise.dtype, device="meta")


def _promise(tensor: QuantizedTensor, name: str) -> Promise:
    return Promise.of(QuantizedSource.of(tensor, name), tensor.device)


def _values(promise: Promise) -> torch.Tensor:
    """The stored bytes of a piece: mapped where that is possible, else read."""
    node = promise.node
    if isinstance(node, SourceView):
        if isinstance(node.source, FileSource):
            return node.source.whole()
        lent = node.source.lend(node.geometry)
        if lent is not None:
            return lent
    raise TypeError(f"not a stored tensor: {promise!r}")
