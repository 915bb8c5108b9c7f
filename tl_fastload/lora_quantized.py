"""LoRA merged into quantized matrices: dequantized, updated, and quantized again in the same way,
as peft's `merge_and_unload` does it.
"""

from __future__ import annotations

import torch

from tl_fastload.errors import QuantizationError
from tl_fastload.evaluator import evaluate
from tl_fastload.lora import Merge
from tl_fastload.promise import Promise
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.quantized.content import Content
from tl_fastload.quantized.recipes import QuantizedSource
from tl_fastload.recipe import MemorySource, SourceView


def requantized(weight: Promise, merge: Merge) -> Promise:
    """A promise of a quantized matrix with an update merged in: a `tl_fastload.lora.Requantize`.

    Raises:
        QuantizationError: the weight is pieced together of several quantized matrices, or is of a
            format that cannot quantize.
    """
    node = weight.node
    source = node.source if isinstance(node, SourceView) else None
    if not isinstance(source, QuantizedSource) or source.shape.numel() != weight.numel():
        raise QuantizationError(
            "an adapter updates a matrix that is pieced together of quantized ones, which "
            "cannot be quantized again. Merge into the unquantized model with quantize=."
        )
    rows, columns = source.shape
    # On the meta device it costs nothing, and says now what it would say after reading.
    outline = source.outline.requantize(torch.empty(rows, columns, device="meta"))
    made = Promise.of(
        QuantizedSource(
            lambda: _updated(source, merge),
            (rows, columns),
            source.dtype,
            source.name,
            outline,
            source.home,
        ),
        weight.device,
    )
    return made if weight.stride() == made.stride() else made.t()  # type: ignore[return-value]


def _updated(source: QuantizedSource, merge: Merge) -> QuantizedTensor:
    old = source.matrix()
    source.release()  # the parts of a fused matrix hold the updated one
    stored = old.content.stored
    # Values as the format dequantizes them, then float32, in which peft adds.
    dense = QuantizedTensor(old.content, None, stored.default_dtype).dequantize().float()
    promise = Promise.of(MemorySource(dense, source.name), dense.device)
    made = stored.requantize(evaluate(merge(promise).node, dense.device).tensor)
    return QuantizedTensor(Content(made, old.content.compute_dtype), None, source.dtype)
