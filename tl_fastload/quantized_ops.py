"""What each operation does to a quantized tensor: the table.

| operation | answer |
|---|---|
| linear, matmul, mm, addmm by a view of whole rows | bitsandbytes' kernel |
| views: permute, reshape, transpose, slice, split ... | the same bytes, another geometry |
| clone, contiguous, to: nothing would move, or whole rows move | bytes |
| a move to a device; another floating point dtype | the bytes moved; the same bytes |
| copy_ from a quantized tensor, `.data = ` | other bytes put in their place |
| writing into it, requires_grad = True | error |
| requires_grad_(), as a module calls it on each parameter | a warning |
| anything else | the dequantized values |

Linear maps are caught above autograd, so that bitsandbytes' own backward pass runs; the rest below
it, so that the graph holds bytes and every use dequantizes anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from tl_fastload import quantized_view
from tl_fastload.errors import QuantizationError
from tl_fastload.quantized_matrix import COMPUTING_DTYPES, QuantizedMatrix
from tl_fastload.tracing import is_transformed, untraced

aten = torch.ops.aten

_VIEW_NAMES = """
    _reshape_alias.default _unsafe_view.default alias.default detach.default diagonal.default
    expand.default lift_fresh.default permute.default select.int slice.Tensor split.Tensor
    split_with_sizes.default squeeze.default squeeze.dim squeeze.dims t.default transpose.int
    unbind.int unfold.default unsqueeze.default view.default view_as.default
""".split()


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(
        getattr(aten, packet, None), overload, None
    )  # absent from some versions of torch


_VIEWS = {_overload(name) for name in _VIEW_NAMES} - {None}


def call_function(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`__torch_function__` of a quantized tensor."""
    handler = _FUNCTIONS.get(func)
    if handler is not None:
        result = handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def call_operator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`__torch_dispatch__` of a quantized tensor."""
    if func in _VIEWS:
        return _view(func, args, kwargs)
    handler = _OPERATORS.get(func)
    if handler is not None:
        result = handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
    # In inference mode composite operations (reshape, contiguous, to) arrive whole.
    parts = func.decompose(*args, **kwargs)
    if parts is not NotImplemented:
        return parts
    _refuse_writes(func, args, kwargs)
    return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))


def _dense(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QuantizedMatrix) else value


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if isinstance(value, QuantizedMatrix):
            raise QuantizationError(
                f"{func} writes into a quantized weight, whose values cannot be changed one by "
                f"one. Work on "
                "`.dequantize()`, or replace the whole weight."
            )


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    source = args[0]
    with untraced():
        seen = func(source.geometry, *args[1:], **kwargs)

    def wrap(geometry: Any) -> Any:
        return type(source)(source.content, geometry, source.dtype)

    return wrap(seen) if isinstance(seen, torch.Tensor) else [wrap(part) for part in seen]


def _clone(source: Any, *, memory_format: Any = None) -> Any:
    """The same bytes where the layout stays, or where whole rows move."""
    if memory_format == torch.contiguous_format and not source.is_contiguous():
        rows = source.contiguous_rows()
        return NotImplemented if rows is None else rows
    if memory_format not in (None, torch.preserve_format, torch.contiguous_format):
        return NotImplemented
    return type(source)(source.content, source.geometry, source.dtype)


def _to_copy(
    source: Any,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> Any:
    dtype = source.dtype if dtype is None else dtype
    if dtype not in COMPUTING_DTYPES or layout not in (None, torch.strided):
        return NotImplemented
    same = _clone(source, memory_format=memory_format)
    if same is NotImplemented:
        return NotImplemented
    content = same.content
    if device is not None:
        content = content.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
    if dtype != source.dtype and content.compute_dtype is not None:
        content = replace(content, compute_dtype=dtype)
    return type(source)(content, same.geometry, dtype)


def _copy_(target: Any, source: Any, non_blocking: bool = False) -> Any:
    """`load_state_dict`: the target gets bytes of its own, the source keeps its memory. Bytes that
    the target has already stay where they are.
    """
    if not isinstance(target, QuantizedMatrix):
        return target.copy_(_dense(source), non_blocking)
    if not isinstance(source, QuantizedMatrix):
        raise QuantizationError(
            f"a quantized weight {list(target.shape)} cannot take the values of a {source.dtype} "
            "tensor: quantize them first, or load with `assign=True`. DistributedDataParallel "
            "sends all weights around unless it is told to ignore some; before wrapping the model: "
            "DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [name for "
            "name, p in model.named_parameters() if not p.requires_grad])."
        )
    if not quantized_view.is_same(source.geometry, target.geometry):
        raise QuantizationError(
            f"a quantized weight {list(target.shape)} with strides {target.stride()} cannot take "
            f"the bytes of a "
            f"{list(source.shape)} one with strides {source.stride()}. Load with `assign=True`."
        )
    content = source.content
    if not target.shares_bytes(source):
        content = content.map(lambda tensor: tensor.to(target.device, copy=True))
    target.become(type(target)(content, target.geometry, target.dtype))
    return target


def _set_data(target: Any, value: Any) -> Any:
    """`tensor.data = value`, with which older versions of torch move the parameters of a module."""
    if isinstance(target, QuantizedMatrix) and not isinstance(value, QuantizedMatrix):
        raise QuantizationError(
            "the data of a quantized weight can only be set to a quantized weight."
        )
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.data.__set__(target, value)  # type: ignore[attr-defined]
    if isinstance(target, QuantizedMatrix):
        target.become(value)
    return None


def _skip_gradient(tensor: Any, requires_grad: bool = True) -> Any:
    """`module.requires_grad_()` calls this on each of its parameters: the others can train."""
    if not requires_grad or not isinstance(tensor, torch.nn.Parameter):
        return _refuse_gradient(tensor, requires_grad)
    warnings.warn(
        "Quantized weights have no gradient: requires_grad_() leaves them frozen, and what else is "
        "there trains.",
        stacklevel=6,  # past torch's own calls
    )
    return tensor


def _refuse_gradient(tensor: Any, requires_grad: bool = True) -> Any:
    if requires_grad:
        raise QuantizationError(
            "quantized weights have no gradient: make the parameter with `requires_grad=False`. In "
            "a module, set `requires_grad` on the other parameters one by one."
        )
    return NotImplemented


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    return _multiply(input, weight, weight.geometry, bias) if _is_weight(weight) else NotImplemented


def _matmul(input: Any, other: Any, *, out: Any = None) -> Any:
    if out is not None or not _is_weight(other):
        return NotImplemented
    return _multiply(input, other, quantized_view.transposed(other.geometry), None)


def _mm(input: Any, mat2: Any, *, out: Any = None) -> Any:
    return _matmul(input, mat2, out=out) if input.dim() == 2 else NotImplemented


def _addmm(
    input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None
) -> Any:
    if out is not None or (beta, alpha) != (1, 1) or mat1.dim() != 2 or not _is_weight(mat2):
        return NotImplemented
    columns = quantized_view.transposed(mat2.geometry)
    if input.shape == (mat2.shape[1],):
        return _multiply(mat1, mat2, columns, input)
    product = _multiply(mat1, mat2, columns, None)
    return product if product is NotImplemented else product + input.to(product.dtype)


def _is_weight(tensor: Any) -> bool:
    return isinstance(tensor, QuantizedMatrix) and tensor.dim() == 2


def _multiply(x: Any, weight: QuantizedMatrix, geometry: torch.Tensor, bias: Any) -> Any:
    # A product of two weights is one of matrices, not of an activation: it takes the exact values.
    if isinstance(x, (QuantizedMatrix, torch.nn.Parameter)) or isinstance(bias, QuantizedMatrix):
        return NotImplemented
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != geometry.shape[1]:
        return NotImplemented
    if is_transformed():
        # Kernels have no rules for these: they raise, or lose tangents without a word.
        return F.linear(x, type(weight)(weight.content, geometry, weight.dtype).dequantize(), bias)
    content = weight.rows_content(geometry)
    return NotImplemented if content is None else content.linear(x, bias)


def _on_values(func: Callable[..., Any]) -> Callable[..., Any]:
    """Read out by torch below its dispatcher, where only real memory will do."""

    def handler(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return func(_dense(tensor), *args, **kwargs)

    return handler


def _share_memory(tensor: Any) -> Any:
    """What there is to share is the bytes: the tensor itself has no memory."""
    tensor.content.map(torch.Tensor.share_memory_)
    return tensor


def _is_shared(tensor: Any) -> bool:
    return all(part.is_shared() for part in tensor.content.tensors().values())


def _swapped(self: Any, other: Any) -> Any:
    return _matmul(other, self)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.__rmatmul__: _swapped,
    torch.mm: _mm,
    torch.Tensor.mm: _mm,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.Tensor.requires_grad_: _skip_gradient,
    torch.Tensor.requires_grad.__set__: _refuse_gradient,  # type: ignore[attr-defined]
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    torch.Tensor.numpy: _on_values(torch.Tensor.numpy),
    torch.Tensor.tolist: _on_values(torch.Tensor.tolist),
    torch.Tensor.__array__: _on_values(torch.Tensor.__array__),
    torch.Tensor.__dlpack__: _on_values(torch.Tensor.__dlpack__),
    torch.Tensor.share_memory_: _share_memory,
    torch.Tensor.is_shared: _is_shared,
}

_OPERATORS: dict[Any, Callable[..., Any]] = {
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
}
