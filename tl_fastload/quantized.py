"""A tensor that stays bytes: a dense matrix's shape and dtype over bitsandbytes' rows or blocks.

Views are bookkeeping, linear maps run on bitsandbytes' kernels, and everything else sees the
dequantized values; `tl_fastload.quantized_ops` holds the table that decides. The bytes are never
written: an in-place operation raises, and what would replace them (`load_state_dict`, a move) puts
other bytes in their place. So `clone` shares them, and only `copy.deepcopy` copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tl_fastload import bnb_kernels, quantized_ops
from tl_fastload.compat import not_compiled
from tl_fastload.quantized_content import Content
from tl_fastload.quantized_matrix import QuantizedMatrix


class QuantizedTensor(QuantizedMatrix):
    """A view of a quantized matrix; see the module's text."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        tensors, plain = self.content.parts()
        view = (tuple(self.shape), tuple(self.stride()), self.storage_offset())
        is_parameter = isinstance(self, torch.nn.Parameter)
        return rebuild, (tensors, plain, *view, self.dtype, is_parameter)

    @classmethod
    @not_compiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return quantized_ops.call_function(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch passes no kwargs at times
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return quantized_ops.call_operator(func, args, kwargs or {})


def rebuild(
    tensors: Mapping[str, torch.Tensor],
    plain: Mapping[str, Any],
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    dtype: torch.dtype,
    is_parameter: bool,
) -> QuantizedTensor:
    """Make a saved tensor again. `torch.load(weights_only=True)` must be allowed this name."""
    made = QuantizedTensor.of_view(Content.build(tensors, plain), shape, stride, offset, dtype)
    if is_parameter:
        made = torch.nn.Parameter(made, requires_grad=False)  # type: ignore[assignment]
    return made


def from_linear8bit(
    source: Any, *, dtype: torch.dtype | None = None, threshold: float | None = None
) -> QuantizedTensor:
    """The weight [out, in] of a `bitsandbytes.nn.Linear8bitLt`, sharing its bytes.

    Args:
        source: the module, or its `Int8Params`.
        dtype: what the tensor computes in; None for float32.
        threshold: of outlier activations; None for the module's own (for a bare weight 6,
            transformers' default).

    Raises:
        QuantizationError: not quantized yet, scales missing or misshapen, no bitsandbytes or no
            kernel.
    """
    return QuantizedTensor(Content(bnb_kernels.from_linear8bit(source, threshold)), None, dtype)


def from_params4bit(
    source: Any,
    *,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> QuantizedTensor:
    """The weight [out, in] of a `bitsandbytes.nn.Linear4bit`, sharing its bytes.

    Args:
        source: the module, or its `Params4bit`.
        dtype: what the tensor computes in; None for the dtype that was quantized.
        compute_dtype: what the kernel multiplies in; None for the module's own, or else the
            activations' dtype.

    Raises:
        QuantizationError: not quantized yet, scales missing or misshapen, no bitsandbytes or no
            kernel.
    """
    stored = bnb_kernels.from_params4bit(source)
    compute_dtype = compute_dtype or bnb_kernels.compute_dtype_of(source)
    return QuantizedTensor(Content(stored, compute_dtype), None, dtype)


def from_bytes(
    stored: Any,
    *,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> QuantizedTensor:
    """The matrix [out, in] of some `QuantizedBytes`, such as `quantized_checkpoint.read` returns.

    Raises:
        QuantizationError: no bitsandbytes, or no kernel for the device of the bytes.
    """
    bnb_kernels.require_device(stored.device)
    return QuantizedTensor(Content(stored, compute_dtype), None, dtype)


def quantize(
    dense: torch.Tensor,
    kind: str,
    *,
    blocksize: int = 64,
    double_quant: bool = False,
    threshold: float = 6.0,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> QuantizedTensor:
    """Quantize a matrix, byte for byte as bitsandbytes does, on the matrix's device.

    Args:
        dense: [out, in], floating point; transpose a `Conv1D` weight first, as transformers does.
        kind: "int8", "nf4" or "fp4".
        blocksize: values per block, for the 4-bit kinds.
        double_quant: whether to quantize the scales too, for the 4-bit kinds.
        threshold: activations from here on are outliers, for int8; 0 for none.
        dtype: what the tensor computes in; None for that of `dense`.
        compute_dtype: what a 4-bit kernel multiplies in; None for the activations' dtype.

    Raises:
        QuantizationError: not a matrix, a kind or a block size of bitsandbytes; values that int8
            cannot scale; no bitsandbytes, or no kernel for the device.
    """
    stored = bnb_kernels.quantize(
        dense, kind, threshold=threshold, blocksize=blocksize, double_quant=double_quant
    )
    return QuantizedTensor(Content(stored, compute_dtype), None, dtype or dense.dtype)


def has_quantized(module: torch.nn.Module) -> bool:
    """Whether any parameter of a module is quantized."""
    return bool(quantized_kinds(module))


def quantized_kinds(module: torch.nn.Module) -> set[str]:
    """How the parameters of a module are quantized: any of "int8", "nf4" and "fp4"."""
    held = (p for p in module.parameters() if isinstance(p, QuantizedTensor))
    return {parameter.content.stored.kind for parameter in held}
