"""A tensor that stays bytes: a dense matrix's shape and dtype over the rows or blocks of a format.

Views are bookkeeping, linear maps run on the format's kernel, and everything else sees the
dequantized values; `tl_fastload.quantized.ops` holds the table that decides. The bytes are never
written: an in-place operation raises, and what would replace them (`load_state_dict`, a move) puts
other bytes in their place. So `clone` shares them, and only `copy.deepcopy` copies.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from tl_fastload.errors import QuantizationError
from tl_fastload.ground.compat import not_compiled
from tl_fastload.quantized import formats, views
from tl_fastload.quantized.content import Content
from tl_fastload.quantized.formats.base import QuantizedBytes
from tl_fastload.quantized.spec import Spec

if TYPE_CHECKING:
    from typing_extensions import Self

COMPUTING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""Functions above autograd -> what they do to a quantized tensor."""
OPERATORS: dict[Any, Callable[..., Any]] = {}
"""Operators below autograd -> likewise."""


class QuantizedTensor(torch.Tensor):
    """A view of a quantized matrix; see the module's text.

    Attributes:
        content: the bytes and what belongs to them.
        geometry: meta tensor; its shape, strides and offset select elements of the dense matrix
            [out, in].
        is_frozen: a parameter whose module was told that nothing in it trains: what is looked up in
            it then starts no gradients.
    """

    content: Content
    geometry: torch.Tensor
    is_frozen: bool = False

    @staticmethod
    def __new__(
        cls, content: Content, geometry: torch.Tensor | None = None, dtype: Any = None
    ) -> Self:
        if geometry is None:
            geometry = views.whole(content.stored.shape)
        dtype = content.stored.default_dtype if dtype is None else dtype
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
            f"dtype={self.dtype}, device={self.device}, bytes={self.nbytes_stored()})"
        )

    def nbytes_stored(self) -> int:
        """Bytes of everything that this tensor holds, also of rows that its view does not show."""
        return self.content.nbytes()

    def dequantize(self) -> torch.Tensor:
        """The values as an ordinary tensor of the same shape, strides and dtype."""
        content, geometry = self.content, self.geometry
        if geometry.numel() < math.prod(content.stored.shape):
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
        content = self.content
        if content.center_in:
            raise QuantizationError(
                "a quantized matrix that is centred over its input cannot be scaled exactly: scale "
                "it first."
            )
        columns = content.stored.shape[1]
        if scale.shape != (columns,):
            raise QuantizationError(
                f"a matrix with {columns} inputs needs as many scales, not {list(scale.shape)}."
            )
        scale = scale.detach().to(content.stored.device)
        scale = scale.to(torch.promote_types(scale.dtype, torch.float32))
        scale = scale if content.in_scale is None else content.in_scale * scale
        return type(self)(replace(content, in_scale=scale), self.geometry, self.dtype)

    def shift_input(self, shift: torch.Tensor) -> Self:
        """The same linear map, with `shift` [in] added in front of the kernel and its image taken
        off behind: `x W = (x + shift) W - shift W`.

        Folding a norm's bias or a value bias takes it out of the activation. A kernel that rounds
        activations has to see the one that the weights were quantized for.
        """
        content = self.content
        shift = shift.detach().to(content.stored.device, torch.float32)
        # No matrix product, whose exactness the process's settings decide.
        image = content.stored.dense(torch.float32).mul_(shift).sum(1)
        if content.in_shift is not None and content.out_shift is not None:
            shift, image = content.in_shift + shift, content.out_shift + image
        moved = replace(content, in_shift=shift, out_shift=image)
        return type(self)(moved, self.geometry, self.dtype)

    def center_input(self) -> Self:
        """The same view of the matrix less its mean over the input, bytes untouched and shared."""
        return type(self)(replace(self.content, center_in=True), self.geometry, self.dtype)

    def center_output(self) -> Self:
        """The same view of the matrix less its mean over the output, rows not shown included."""
        return type(self)(replace(self.content, center_out=True), self.geometry, self.dtype)

    def rows_content(self, geometry: torch.Tensor) -> Content | None:
        """What multiplies by a view [rows, in] of whole rows; None if no kernel can."""
        view = views.linear_rows(geometry, self.content.stored.shape[1])
        if view is None:
            return None
        if geometry.shape[0] == self.content.stored.shape[0] and geometry.is_contiguous():
            return self.content
        try:
            return self.content.rows(view.index())
        except QuantizationError:
            return None

    def packed_rows(self) -> Self | None:
        """The same values over only the rows that this view shows, in the order of its dimensions;
        None if it does not show whole rows, or rows that can be taken out.
        """
        try:
            return type(self)(*self._compact(in_order=True), self.dtype)
        except QuantizationError:
            return None

    def become(self, other: QuantizedTensor) -> None:
        """Hold the bytes of another tensor from now on."""
        self.content, self.geometry = other.content, other.geometry

    def shares_bytes(self, other: QuantizedTensor) -> bool:
        """Whether the other tensor's bytes lie in the same memory, with the same scales."""
        mine, theirs = self.content.stored.tensors(), other.content.stored.tensors()
        return mine.keys() == theirs.keys() and all(
            mine[name].data_ptr() == theirs[name].data_ptr() for name in mine
        )

    def _compact(self, in_order: bool = False) -> tuple[Content, torch.Tensor]:
        view = views.row_view(self.geometry, self.content.stored.shape[1])
        if view is None:
            raise QuantizationError("the view does not show whole rows of the quantized matrix")
        if in_order:
            view = replace(view, row_dims=tuple(sorted(view.row_dims)))
        run = view.run
        return self.content.rows(view.index() if run is None else run), view.packed()

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
        return cls(content, views.part(content.stored.shape, shape, stride, offset), dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        tensors, plain = self.content.parts()
        view = (tuple(self.shape), tuple(self.stride()), self.storage_offset())
        is_parameter = isinstance(self, torch.nn.Parameter)
        return rebuild, (tensors, plain, *view, self.dtype, is_parameter)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        content = self.content.map(lambda tensor: copy.deepcopy(tensor, memo))
        made = type(self)(content, self.geometry, self.dtype)
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=False)
        memo[id(self)] = made
        return made

    @classmethod
    @not_compiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = FUNCTIONS.get(func)
        if handler is not None:
            result = handler(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch passes no kwargs at times
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = OPERATORS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        # In inference mode composite operations (reshape, contiguous, to) arrive whole.
        parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        _refuse_writes(func, args, kwargs)
        return func(*tree_map(as_dense, args), **tree_map(as_dense, kwargs))


def as_dense(value: Any) -> Any:
    """The values of a quantized tensor; anything else as it is."""
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if isinstance(value, QuantizedTensor):
            raise QuantizationError(
                f"{func} writes into a quantized weight, whose values cannot be changed one by "
                "one. Work on `.dequantize()`, or replace the whole weight."
            )


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


rebuild.__module__ = "tl_fastload.quantized"  # under which files name it


def from_bytes(
    stored: QuantizedBytes,
    *,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> QuantizedTensor:
    """The matrix [out, in] of some bytes, which are shared.

    Args:
        stored: the bytes.
        dtype: what the tensor computes in; None for the dtype that was quantized, where it is
            known, else float32.
        compute_dtype: what a kernel with a choice multiplies in; None for the activations' dtype.

    Raises:
        QuantizationError: the format cannot multiply on the device of the bytes.
    """
    formats.of_kind(stored.kind).require_device(stored.device)
    return QuantizedTensor(Content(stored, compute_dtype), None, dtype)


def quantize(
    dense: torch.Tensor, kind: str | Spec, *, dtype: torch.dtype | None = None, **settings: Any
) -> QuantizedTensor:
    """Quantize a matrix on its device; bitsandbytes' kinds byte for byte as bitsandbytes does.

    Args:
        dense: [out, in], floating point; transpose a `Conv1D` weight first, as transformers does.
        kind: "int8", "nf4", "fp4" or the kind of another format; or a whole spec.
        dtype: what the tensor computes in; None for that of `dense`.
        **settings: fields of the kind's spec, if that is not given whole: `compute_dtype`, and for
            bitsandbytes `blocksize`, `double_quant` and `threshold`.

    Raises:
        QuantizationError: not a matrix; no such kind; settings or values that cannot be; no kernel
            for the device.
    """
    if dense.dim() != 2 or not dense.is_floating_point():
        raise QuantizationError(
            f"only a floating point matrix can be quantized, not {list(dense.shape)} {dense.dtype}."
        )
    spec = kind if isinstance(kind, Spec) else formats.make_spec(kind, **settings)
    stored = formats.of_kind(spec.kind).quantize(dense, spec)
    return QuantizedTensor(Content(stored, spec.compute_dtype), None, dtype or dense.dtype)


def has_quantized(module: torch.nn.Module) -> bool:
    """Whether any parameter of a module is quantized."""
    return bool(quantized_kinds(module))


def quantized_kinds(module: torch.nn.Module) -> set[str]:
    """How the parameters of a module are quantized: the kinds of their bytes, such as "nf4"."""
    held = (p for p in module.parameters() if isinstance(p, QuantizedTensor))
    return {parameter.content.stored.kind for parameter in held}
