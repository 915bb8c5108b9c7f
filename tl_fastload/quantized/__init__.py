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

__all__ = [
    "QuantizedTensor",
    "from_bytes",
    "has_quantized",
    "ops",
    "quantize",
    "quantized_kinds",
    "rebuild",
]
