"""Promises for quantized weights: of a loaded transformers model, or of a saved checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tl_fastload.errors import LeanLoadError, QuantizationError
from tl_fastload.quantized import formats
from tl_fastload.quantized.content import Content
from tl_fastload.quantized.formats.base import Format, QuantizedBytes, damaged
from tl_fastload.quantized.recipes import QuantizedSource, is_stored_quantized
from tl_fastload.quantized.spec import Spec
from tl_fastload.quantized.tensor import QuantizedTensor
from tl_fastload.recipes.nodes import SourceView
from tl_fastload.recipes.promise import Promise
from tl_fastload.source.reader import FileSource

_AS_SAVED = "the one that the checkpoint was saved with"
_FOREIGN = ("qweight", "weight_scale", "weight_scale_inv")
"""Pieces of formats that are not here."""


def promise_of_layer(module: nn.Module, name: str, dtype: torch.dtype) -> Promise | None:
    """A promise of the weight [out, in] of a quantized layer in memory, sharing its bytes; None for
    others.

    Args:
        module: any module of a transformers model.
        name: of the weight, for messages.
        dtype: what the promise computes in.

    Raises:
        QuantizationError: a quantized layer that cannot be read, or has no kernel here.
    """
    layer = formats.of_layer(module, name)
    if layer is None:
        return None
    tensor = QuantizedTensor(Content(*layer), None, dtype)
    return Promise.of(QuantizedSource.of(tensor, name), tensor.device)


def spec_of_layers(model: Any) -> Spec | None:
    """How the quantized layers of a model in memory are quantized, which its configuration need not
    say if they were put there by hand; None without such layers.
    """
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        layer = formats.of_layer(module, f"{name}.weight")
        if layer is not None:
            return formats.make_spec(layer[0].kind)
    return None


def is_quantized(promises: Mapping[str, Promise]) -> bool:
    """Whether a checkpoint's tensors are such as only quantized weights have."""
    return any(_pieces(promises, format) for format in formats.FORMATS)


def refuse_undeclared(promises: Mapping[str, Promise]) -> None:
    """Check that no weight of a checkpoint is quantized, which declares none to be.

    Raises:
        QuantizationError: some are; says what the configuration lacks.
    """
    marks, codes = dict.fromkeys(_FOREIGN, _AS_SAVED), set[torch.dtype]()
    for format in formats.FORMATS:
        marks |= format.undeclared
        # 8-bit floats without scales are numbers as they stand.
        codes |= {dtype for dtype in format.codes if not dtype.is_floating_point}
    pieces = {
        name: lacking
        for name in promises
        for piece, lacking in marks.items()
        if name.endswith("." + piece)
    }
    coded = {
        name: _AS_SAVED
        for name, promise in promises.items()
        if name.endswith(".weight") and promise.dtype in codes
    }
    for name, lacking in {**pieces, **coded}.items():  # those that say most first
        raise QuantizationError(
            f"{name} ({promises[name].dtype}) belongs to quantized weights, but config.json has no "
            f"quantization_config. Add it again: {lacking}."
        )


def combine(
    promises: Mapping[str, Promise], spec: Spec, dtype: torch.dtype, *, dense: bool = False
) -> dict[str, Promise]:
    """Replace the pieces of each quantized weight of a checkpoint by one promise of the matrix.

    Args:
        promises: by checkpoint name; quantized weights come in several pieces.
        spec: the quantization that the checkpoint declares.
        dtype: what the weights compute in.
        dense: promise ordinary weights, which are dequantized when they are read.

    Raises:
        QuantizationError: pieces are missing or misshapen, or not of the kind that is declared.
            No weight has been read then, only shapes.
    """
    format = formats.of_kind(spec.kind)
    pieces = _pieces(promises, format)
    if not pieces:
        raise QuantizationError(
            f"the configuration declares {spec.kind} weights, but the checkpoint has none that are "
            "quantized. Remove quantization_config from config.json, and use quantize= to quantize."
        )
    used = {name for parts in pieces.values() for name in parts.values()}
    combined = {
        name: promise
        for name, promise in promises.items()
        if name not in used and not name.endswith(tuple(format.ignored))
    }
    for name, promise in combined.items():
        # 8-bit floats that no scales belong to: codes are not numbers.
        if promise.is_floating_point() and promise.element_size() == 1:
            raise damaged(
                f"{name} ({promise.dtype}) has none of the scales that {spec.kind} weights have"
            )
    for weight, parts in pieces.items():
        stored = {piece: promises[name] for piece, name in parts.items()}
        combined[weight] = _promise_of_pieces(weight, stored, spec, dtype, dense)
    return combined


def _pieces(promises: Mapping[str, Promise], format: Format) -> dict[str, dict[str, str]]:
    """Name of each quantized weight -> its pieces -> their names in the checkpoint."""
    found: dict[str, dict[str, str]] = {}
    for name in promises:
        for end, weight_end in format.pieces.items():
            if name.endswith(end):
                weight = name.removesuffix(end) + weight_end
                found.setdefault(weight, {})[end[1:]] = name
    for name, promise in promises.items():
        leaf = name.rpartition(".")[2]
        if name in found or (leaf == "weight" and promise.dtype in format.codes):
            found.setdefault(name, {})[leaf] = name
    return found


def _promise_of_pieces(
    name: str, parts: Mapping[str, Promise], spec: Spec, dtype: torch.dtype, dense: bool
) -> Promise:
    format, layer = formats.of_kind(spec.kind), name.removesuffix(".weight")

    def assembled(pieces: Mapping[str, torch.Tensor]) -> QuantizedBytes:
        try:
            return format.assemble(pieces, spec)
        except QuantizationError as error:
            raise QuantizationError(f"{layer}: {error}") from error

    def load() -> QuantizedTensor:
        stored = assembled({part: _values(promise) for part, promise in parts.items()})
        # Kernels were asked for where they will run: here the bytes need none.
        return QuantizedTensor(Content(stored, spec.compute_dtype), None, dtype)

    outlines = {
        part: torch.empty(promise.shape, dtype=promise.dtype, device="meta")
        if part not in format.descriptions
        else _values(promise)
        for part, promise in parts.items()
    }
    outline = assembled(outlines)
    if outline.kind != spec.kind:
        raise QuantizationError(
            f"{layer} holds {outline.kind} weights, but the configuration declares {spec.kind}. "
            "Correct quantization_config in config.json."
        )
    home = _home(max(parts.values(), key=lambda promise: promise.numel()))
    source = QuantizedSource(load, dtype, name, outline, home, dense=dense)
    made: Promise = format.as_parameter(Promise.of(source), outlines)
    return made


def zero_biases(names: Iterable[str], promises: Mapping[str, Promise]) -> list[str]:
    """Those of some tensors that are biases of quantized weights and hold nothing but zeros:
    AutoGPTQ gave one to every layer.

    Args:
        names: among those of `promises`.
        promises: as `combine` leaves them.
    """
    found = []
    for name in names:
        weight = promises.get(f"{name.removesuffix('.bias')}.weight")
        if not name.endswith(".bias") or weight is None or name not in promises:
            continue
        if is_stored_quantized(weight.node) and _is_zero(promises[name]):
            found.append(name)
    return found


def _is_zero(promise: Promise) -> bool:
    try:
        return not bool(_values(promise).any())
    except (OSError, LeanLoadError):  # a plan of files that are not here
        return True


def _home(promise: Promise) -> torch.device | None:
    """Where a stored tensor lies: on the CPU, too, if its file is mapped; None if it is read."""
    node = promise.node
    if not isinstance(node, SourceView):
        return None
    if isinstance(node.source, FileSource):
        return torch.device("cpu") if node.source.is_mapped() else None
    return promise.device


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
