"""Matrices that stay bytes; one file a format (`formats/`). Knows no models, no parameter names."""

from tl_fastload.quantized import ops  # makes QuantizedTensor answer torch's operations
from tl_fastload.quantized.tensor import (
    QuantizedTensor,
    from_bytes,
    has_quantized,
    quantize,
    quantized_kinds,
    rebuild,
)
from tl_fastload.source import torch_files

torch_files.allow(rebuild)  # quantized tensors that we have saved are read as well

__all__ = [
    "QuantizedTensor",
    "from_bytes",
    "has_quantized",
    "ops",
    "quantize",
    "quantized_kinds",
    "rebuild",
]
