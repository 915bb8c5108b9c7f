"""A quantized matrix seen through a view: shape and dtype over bitsandbytes' rows or blocks.

This is the data and what can be said and made of it; what torch's operations do to it stands in
`tl_fastload.quantized_ops`, and `tl_fastload.quantized` puts the two together.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from tl_fastload import quantized_view
from tl_fastload.errors import QuantizationError
from tl_fastload.quantized_bytes import FourBitBytes
from tl_fastload.quantized_content import Content

if TYPE_CHECKING:
    from typing_extensions import Self

COMPUTING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class QuantizedMatrix(torch.Tensor):
    """A view of a quantized matrix; `QuantizedTensor` says what operations do to it.

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
    ) -> Self:
        if geometry is None:
            geometry = quantized_view.whole(content.stored.shape)
        dtype = _default_dtype(content) if dtype is None else dtype
        if dtype not in COMPUTING_DTYPES:
            raise QuantizationError(f"quantized weights cannot compute in {dtype}.")
        # In inference mode torch cannot make views of an ordinary tensor's wrapper otherwise.
        with torch.inference_mode(False):
            tensor: Self = torch.Tensor._make_wrapper_subclass(
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

    def compact(self) -> Self:
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

    def scale_input(self, scale: torch.Tensor) -> Self:
        """The same view of the matrix with its columns multiplied by `scale` [in], bytes untouched
        and shared.

        Raises:
            QuantizationError: the matrix is centred over its input already, or `scale` has another
                length.
        """
        return type(self)(self.content.scaled_input(scale), self.geometry, self.dtype)

    def shift_input(self, shift: torch.Tensor) -> Self:
        """The same map, whose kernel sees activations moved by `shift` [in]; values are the
        same.
        """
        return type(self)(self.content.shifted_input(shift), self.geometry, self.dtype)

    def center_input(self) -> Self:
        """The same view of the matrix less its mean over the input, bytes untouched and shared."""
        return type(self)(replace(self.content, center_in=True), self.geometry, self.dtype)

    def center_output(self) -> Self:
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

    def contiguous_rows(self) -> Self | None:
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

    def become(self, other: QuantizedMatrix) -> None:
        """Hold the bytes of another tensor from now on."""
        self.content, self.geometry = other.content, other.geometry

    def shares_bytes(self, other: QuantizedMatrix) -> bool:
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
    ) -> Self:
        content = Content.build(tensors, context["plain"])
        return cls.of_view(content, size, stride, context["offset"], context["dtype"])

    @classmethod
    def of_view(
        cls, content: Content, shape: Any, stride: Any, offset: int, dtype: torch.dtype
    ) -> Self:
        """A view of the matrix that has this shape, these strides and this offset."""
        return cls(content, quantized_view.part(content.stored.shape, shape, stride, offset), dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        content = self.content.map(lambda tensor: copy.deepcopy(tensor, memo))
        made = type(self)(content, self.geometry, self.dtype)
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=False)
        memo[id(self)] = made
        return made


def _default_dtype(content: Content) -> torch.dtype:
    # That of the matrix which was quantized, where it is known; what bitsandbytes dequantizes to,
    # where not.
    stored = content.stored
    return stored.quant_dtype if isinstance(stored, FourBitBytes) else torch.float32
