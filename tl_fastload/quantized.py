"""A tensor that stays bytes: a dense matrix's shape and dtype over bitsandbytes' rows or blocks.

Views are bookkeeping, linear maps run on bitsandbytes' kernels, and everything else sees the
dequantized values; `tl_fastload.quantized_ops` holds the table that decides. The bytes are never
written: an in-place operation raises, and what would replace them (`load_state_dict`, a move) puts
other bytes in their place. So `clone` shares them, and only `copy.deepcopy` copies.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tl_fastload import bnb_kernels, quantized_view
from tl_fastload.errors import QuantizationError
from tl_fastload.quantized_bytes import FourBitBytes
from tl_fastload.quantized_content import Content
from tl_fastload.tracing import not_compiled

COMPUTING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class QuantizedTensor(torch.Tensor):
    """A view of a quantized matrix; see the module's text.

    Attributes:
        content: the bytes and what belongs to them.
        geometry: meta tensor; its shape, strides and offset select elements of the dense matrix
            [out, in].
    """

    content: Content
    geometry: torch.Tensor

    @staticmethod
    def __new__(
        cls, content: Content, geometry: torch.Tensor | None = None, dtype: Any = None
    ) -> QuantizedTensor:
        if geometry is None:
            geometry = quantized_view.whole(content.stored.shape)
        dtype = _default_dtype(content) if dtype is None else dtype
        if dtype not in COMPUTING_DTYPES:
            raise QuantizationError(f"quantized weights cannot compute in {dtype}.")
        # In inference mode torch cannot make views of an ordinary tensor's wrapper otherwise.
        with torch.inference_mode(False):
            tensor: QuantizedTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                geometry.shape,
                strides=geometry.stride(),
                storage_offset=geometry.storage_offset(),
                dtype=dtype,
                device=content.stored.device,
            )
        tensor.content = content
        tensor.geometry = geometry
        return tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # torch.Tensor.__init__ takes no arguments of a subclass.
        pass

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return (
            f"QuantizedTensor({self.content.stored.kind}, shape={tuple(self.shape)}, "
            f"dtype={self.dtype}, "
            f"device={self.device}, bytes={self.nbytes_stored()})"
        )

    def nbytes_stored(self) -> int:
        """Bytes of everything that this tensor holds, also of rows that its view does not show."""
        return sum(t.numel() * t.element_size() for t in self.content.tensors().values())

    def dequantize(self) -> torch.Tensor:
        """The values as an ordinary tensor of the same shape, strides and dtype."""
        content, geometry = self.content, self.geometry
        if geometry.numel() < self._size():
            # Not whole rows: dequantize the matrix, and look at a part of it.
            with contextlib.suppress(QuantizationError):
                content, geometry = self._compact()
        return content.dense(self.dtype).as_strided(
            geometry.shape, geometry.stride(), geometry.storage_offset()
        )

    def compact(self) -> QuantizedTensor:
        """The same values, holding only the rows that this view shows; a run of successive rows
        stays shared.

        Raises:
            QuantizationError: the view does not show whole rows, or rows that can be taken out
                exactly; says why.
        """
        return type(self)(*self._compact(), self.dtype)

    def why_dense(self) -> str | None:
        """Why linear maps by this view have to dequantize it; None if they run on the kernel."""
        try:
            self._compact()
        except QuantizationError as error:
            return str(error)
        return None

    def scale_input(self, scale: torch.Tensor) -> QuantizedTensor:
        """The same view of the matrix with its columns multiplied by `scale` [in], bytes untouched
        and shared.

        Raises:
            QuantizationError: the matrix is centred over its input already, or `scale` has another
                length.
        """
        return type(self)(self.content.scaled_input(scale), self.geometry, self.dtype)

    def shift_input(self, shift: torch.Tensor) -> QuantizedTensor:
        """The same map, whose kernel sees activations moved by `shift` [in]; values are the
        same.
        """
        return type(self)(self.content.shifted_input(shift), self.geometry, self.dtype)

    def center_input(self) -> QuantizedTensor:
        """The same view of the matrix less its mean over the input, bytes untouched and shared."""
        return type(self)(replace(self.content, center_in=True), self.geometry, self.dtype)

    def center_output(self) -> QuantizedTensor:
        """The same view of the matrix less its mean over the output, rows not shown included."""
        return type(self)(replace(self.content, center_out=True), self.geometry, self.dtype)

    def rows_content(self, geometry: torch.Tensor) -> Content | None:
        """What multiplies by a view [rows, in] of whole rows; None if no kernel can."""
        view = quantized_view.linear_rows(geometry, self.content.stored.shape[1])
        if view is None:
            return None
        if geometry.shape[0] == self.content.stored.shape[0] and geometry.is_contiguous():
            return self.content
        try:
            return self.content.rows(view.index())
        except QuantizationError:
            return None

    def contiguous_rows(self) -> QuantizedTensor | None:
        """The same values contiguous, by taking whole rows; None if that is not enough."""
        view = quantized_view.row_view(self.geometry, self.content.stored.shape[1])
        order = None if view is None else view.in_logical_order()
        if view is None or order is None:
            return None
        try:
            content = self.content.rows(view.index(order))
        except QuantizationError:
            return None
        return type(self)(content, view.packed(order), self.dtype)

    def become(self, other: QuantizedTensor) -> None:
        """Hold the bytes of another tensor from now on."""
        self.content, self.geometry = other.content, other.geometry

    def shares_bytes(self, other: QuantizedTensor) -> bool:
        """Whether the other tensor's bytes lie in the same memory, with the same scales."""
        mine, theirs = self.content.stored.tensors(), other.content.stored.tensors()
        return mine.keys() == theirs.keys() and all(
            mine[name].data_ptr() == theirs[name].data_ptr() for name in mine
        )

    def _compact(self) -> tuple[Content, torch.Tensor]:
        view = quantized_view.row_view(self.geometry, self.content.stored.shape[1])
        if view is None:
            raise QuantizationError("the view does not show whole rows of the quantized matrix")
        return self.content.rows(view.index()), view.packed()

    def _size(self) -> int:
        return self.content.stored.shape[0] * self.content.stored.shape[1]

    def __getattr__(self, name: str) -> Any:
        # The names that __tensor_flatten__ gives are attributes; everything else is torch's.
        content = self.__dict__.get("content")
        tensors = {} if content is None else content.tensors()
        if name in tensors:
            return tensors[name]
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        tensors, plain = self.content.parts()
        return list(tensors), {"plain": plain, "offset": self.storage_offset(), "dtype": self.dtype}

    @classmethod
    def __tensor_unflatten__(
        cls, tensors: Mapping[str, torch.Tensor], context: Mapping[str, Any], size: Any, stride: Any
    ) -> QuantizedTensor:
        content = Content.build(tensors, context["plain"])
        return _rebuild_view(content, size, stride, context["offset"], context["dtype"])

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        content = self.content.map(lambda tensor: copy.deepcopy(tensor, memo))
        made = type(self)(content, self.geometry, self.dtype)
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=False)  # type: ignore[assignment]
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        tensors, plain = self.content.parts()
        view = (tuple(self.shape), tuple(self.stride()), self.storage_offset())
        is_parameter = isinstance(self, torch.nn.Parameter)
        return rebuild, (tensors, plain, *view, self.dtype, is_parameter)

    @classmethod
    @not_compiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from tl_fastload import quantized_ops  # the operations build on this module

        return quantized_ops.call_function(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch passes no kwargs at times
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        from tl_fastload import quantized_ops

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
    made = _rebuild_view(Content.build(tensors, plain), shape, stride, offset, dtype)
    if is_parameter:
        made = torch.nn.Parameter(made, requires_grad=False)  # type: ignore[assignment]
    return made


def _rebuild_view(
    content: Content, shape: Any, stride: Any, offset: int, dtype: torch.dtype
) -> QuantizedTensor:
    geometry = quantized_view.part(content.stored.shape, shape, stride, offset)
    return QuantizedTensor(content, geometry, dtype)


def _default_dtype(content: Content) -> torch.dtype:
    # That of the matrix which was quantized, where it is known; what bitsandbytes dequantizes to,
    # where not.
    stored = content.stored
    return stored.quant_dtype if isinstance(stored, FourBitBytes) else torch.float32


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
