"""LoRA merged into quantized matrices: dequantized, updated, and quantized again in the same way,
as peft's `merge_and_unload` does it.
"""

from __future__ import annotations

from typing import Any

import torch

from tl_fastload import quantized
from tl_fastload.errors import QuantizationError
from tl_fastload.evaluator import evaluate
from tl_fastload.lora import Merge
from tl_fastload.promise import MemorySource, Promise, SourceView
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.quantized_bytes import FourBitBytes, Int8Bytes
from tl_fastload.quantized_recipes import QuantizedSource


class Requantizer:
    """Makes promises of quantized matrices with an update merged in; call it as
    `tl_fastload.lora.Requantize`.

    One matrix at a time is held, so that the parts of a fused one are not computed anew.
    """

    def __init__(self) -> None:
        self._held: tuple[Any, QuantizedTensor] | None = None

    def __call__(self, weight: Promise, merge: Merge) -> Promise:
        node = weight.node
        source = node.source if isinstance(node, SourceView) else None
        if not isinstance(source, QuantizedSource) or source.shape.numel() != weight.numel():
            raise QuantizationError(
                "an adapter updates a matrix that is pieced together of quantized ones, which "
                "cannot be quantized again. Merge into the unquantized model with quantize=."
            )
        key = object()

        def load() -> QuantizedTensor:
            if self._held is None or self._held[0] is not key:
                self._held = None
                self._held = (key, _updated(source, merge))
            return self._held[1]

        rows, columns = source.shape
        made = Promise.of(
            QuantizedSource(load, (rows, columns), source.dtype, source.name), weight.device
        )
        return made if weight.stride() == made.stride() else made.t()  # type: ignore[return-value]


def _updated(source: QuantizedSource, merge: Merge) -> QuantizedTensor:
    old = source.load()
    stored = old.content.stored
    blocks = stored if isinstance(stored, FourBitBytes) else None
    # Values as bitsandbytes dequantizes them, then float32, in which peft adds.
    stored_dtype = blocks.quant_dtype if blocks is not None else torch.float32
    dense = QuantizedTensor(old.content, None, stored_dtype).dequantize().float()
    promise = Promise.of(MemorySource(dense, source.name), dense.device)
    return quantized.quantize(
        evaluate(merge(promise).node, dense.device).tensor,
        stored.kind,
        blocksize=blocks.blocksize if blocks is not None else 64,
        double_quant=blocks is not None and blocks.nested_absmax is not None,
        threshold=stored.threshold if isinstance(stored, Int8Bytes) else 6.0,
        dtype=source.dtype,
        compute_dtype=old.content.compute_dtype,
    )
