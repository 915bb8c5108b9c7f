"""What each operation does to a quantized tensor: the table.

| operation | answer |
|---|---|
| linear, matmul, mm, addmm by a view of whole rows | the format's kernel |
| grouped_mm by stacked experts | the same, for experts that have tokens |
| views: permute, reshape, transpose, slice, split ... | the same bytes, another geometry |
| clone, contiguous, to: nothing would move, or whole rows move | bytes |
| a move to a device; another floating point dtype | the bytes moved; the same bytes |
| looking up rows of a matrix: an index of whole numbers, embedding | these rows' values |
| looking up in a parameter, where gradients are on | a leaf, so that activations have gradients |
| copy_ from a quantized tensor, `.data = ` | other bytes put in their place |
| writing into it, requires_grad = True | error |
| requires_grad_(), as a module calls it on each parameter | a warning |
| anything else | the dequantized values |

Linear maps are caught above autograd, so that the kernel's own backward pass runs; the rest below
it, so that the graph holds bytes and every use dequantizes anew. Each answer registers itself at
the class (`implements`), so that the class need not import them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from tl_fastload.errors import QuantizationError
from tl_fastload.quantized import views
from tl_fastload.quantized.tensor import (
    COMPUTING_DTYPES,
    FUNCTIONS,
    OPERATORS,
    QuantizedTensor,
    as_dense,
)

aten = torch.ops.aten

_VIEW_NAMES = """
    _reshape_alias.default _unsafe_view.default alias.default detach.default diagonal.default
    expand.default lift_fresh.default permute.default select.int slice.Tensor split.Tensor
    split_with_sizes.default squeeze.default squeeze.dim squeeze.dims t.default transpose.int
    unbind.int unfold.default unsqueeze.default view.default view_as.default
""".split()


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")  # absent from some versions of torch
    return getattr(getattr(aten, packet, None), overload, None)


def implements(
    *functions: Any, table: dict[Any, Any] = FUNCTIONS
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: what these functions (or operators) do to a quantized tensor. `NotImplemented` as
    the answer gives them the dequantized values.
    """

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        table.update(dict.fromkeys(functions, handler))
        return handler

    return register


def _view(func: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
    with views.untraced():
        seen = func(source.geometry, *args, **kwargs)

    def wrap(geometry: Any) -> Any:
        return type(source)(source.content, geometry, source.dtype)

    return wrap(seen) if isinstance(seen, torch.Tensor) else [wrap(part) for part in seen]


OPERATORS.update(
    {view: functools.partial(_view, view) for view in map(_overload, _VIEW_NAMES) if view}
)


@implements(aten.clone.default, table=OPERATORS)
def _clone(source: Any, *, memory_format: Any = None) -> Any:
    """The same bytes where the layout stays, or where whole rows move."""
    if memory_format == torch.contiguous_format and not source.is_contiguous():
        rows = source.packed_rows()
        return rows if rows is not None and rows.is_contiguous() else NotImplemented
    if memory_format not in (None, torch.preserve_format, torch.contiguous_format):
        return NotImplemented
    return type(source)(source.content, source.geometry, source.dtype)


@implements(aten._to_copy.default, table=OPERATORS)
def _to_copy(source: Any, *, dtype: Any = None, layout: Any = None, **options: Any) -> Any:
    dtype = source.dtype if dtype is None else dtype
    if dtype not in COMPUTING_DTYPES or layout not in (None, torch.strided):
        return NotImplemented
    same = _clone(source, memory_format=options.get("memory_format"))
    if same is NotImplemented:
        return NotImplemented
    content, device = same.content, options.get("device")
    if device is not None:
        is_late = options.get("non_blocking", False)
        content = content.map(lambda tensor: tensor.to(device, non_blocking=is_late))
    if dtype != source.dtype and content.compute_dtype is not None:
        content = replace(content, compute_dtype=dtype)
    return type(source)(content, same.geometry, dtype)


@implements(aten.index.Tensor, table=OPERATORS)
def _index(source: Any, indices: Any) -> Any:
    first, *others = indices
    if first is None or any(other is not None for other in others):
        return NotImplemented
    return _looked_up(source, first)


@implements(aten.index_select.default, table=OPERATORS)
def _index_select(source: Any, dim: int, index: Any) -> Any:
    return _looked_up(source, index) if dim == 0 and index.dim() == 1 else NotImplemented


@implements(aten.embedding.default, table=OPERATORS)
def _embedding(weight: Any, indices: Any, *options: Any, **keywords: Any) -> Any:
    return _looked_up(weight, indices)


def _looked_up(matrix: Any, index: Any) -> Any:
    """The values of some rows, without those of all others.

    Args:
        matrix: what is looked up in.
        index: row numbers, of any shape.
    """
    is_traced = type(index) is not torch.Tensor or views.is_transformed()  # then without numbers
    if is_traced or not isinstance(matrix, QuantizedTensor):
        return NotImplemented
    columns = matrix.content.stored.shape[1]
    view = views.linear_rows(matrix.geometry, columns)
    if view is None or index.dtype not in (torch.int64, torch.int32) or not index.numel():
        return NotImplemented
    rows = matrix.shape[0]
    numbers, places = torch.unique(index.cpu().flatten().long(), return_inverse=True)
    if int(numbers[0]) < -rows or int(numbers[-1]) >= rows:
        return NotImplemented  # torch says which
    try:
        content = matrix.content.rows(view.index()[numbers])
    except QuantizationError:
        return NotImplemented
    values = content.dense(matrix.dtype)
    return values[places.to(values.device)].view(*index.shape, columns)


def _leaf(func: Callable[..., Any]) -> Callable[..., Any]:
    """Embeddings are what a model's activations begin with: looked up in a trainable table, they
    have gradients, and so have those of a table of bytes, which itself has none.
    """

    def look_up(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        tables = [x for x in (*args, *kwargs.values()) if isinstance(x, QuantizedTensor)]
        is_trained = any(isinstance(x, torch.nn.Parameter) and not x.is_frozen for x in tables)
        is_plain = type(found) is torch.Tensor and not found.requires_grad
        if is_trained and is_plain and torch.is_grad_enabled() and not views.is_transformed():
            found.requires_grad_()
        return found

    return look_up


FUNCTIONS.update({func: _leaf(func) for func in (torch.Tensor.__getitem__, F.embedding)})


@implements(aten.copy_.default, table=OPERATORS)
def _copy_(target: Any, source: Any, non_blocking: bool = False) -> Any:
    """`load_state_dict`: the target gets bytes of its own, the source keeps its memory. Bytes that
    the target has already stay where they are.
    """
    if not isinstance(target, QuantizedTensor):
        return target.copy_(as_dense(source), non_blocking)
    if not isinstance(source, QuantizedTensor):
        raise QuantizationError(
            f"a quantized weight {list(target.shape)} cannot take the values of a {source.dtype} "
            "tensor: quantize them first, or load with `assign=True`. DistributedDataParallel "
            "sends all weights around unless it is told to ignore some; before wrapping the model: "
            "DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [name for "
            "name, p in model.named_parameters() if not p.requires_grad])."
        )
    if not views.is_same(source.geometry, target.geometry):
        raise QuantizationError(
            f"a quantized weight {list(target.shape)} with strides {target.stride()} cannot take "
            f"the bytes of a {list(source.shape)} one with strides {source.stride()}. Load with "
            "`assign=True`."
        )
    content = source.content
    if not target.shares_bytes(source):
        content = content.map(lambda tensor: tensor.to(target.device, copy=True))
    target.become(type(target)(content, target.geometry, target.dtype))
    return target


@implements(torch.Tensor.data.__set__)  # type: ignore[attr-defined]
def _set_data(target: Any, value: Any) -> Any:
    """`tensor.data = value`, with which older versions of torch move the parameters of a module."""
    if isinstance(target, QuantizedTensor) and not isinstance(value, QuantizedTensor):
        raise QuantizationError(
            "the data of a quantized weight can only be set to a quantized weight."
        )
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.data.__set__(target, value)  # type: ignore[attr-defined]
    if isinstance(target, QuantizedTensor):
        target.become(value)
    return None


@implements(torch.Tensor.requires_grad_)
def _skip_gradient(tensor: Any, requires_grad: bool = True) -> Any:
    """`module.requires_grad_()` calls this on each of its parameters: the others can train."""
    if isinstance(tensor, torch.nn.Parameter):
        tensor.is_frozen = not requires_grad  # type: ignore[attr-defined]
    if not requires_grad or not isinstance(tensor, torch.nn.Parameter):
        return _refuse_gradient(tensor, requires_grad)
    warnings.warn(
        "Quantized weights have no gradient: requires_grad_() leaves them frozen, and what else is "
        "there trains.",
        stacklevel=6,  # past torch's own calls
    )
    return tensor


@implements(torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _refuse_gradient(tensor: Any, requires_grad: bool = True) -> Any:
    if requires_grad:
        raise QuantizationError(
            "quantized weights have no gradient: make the parameter with `requires_grad=False`. In "
            "a module, set `requires_grad` on the other parameters one by one."
        )
    return NotImplemented


@implements(F.linear)
def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    return _multiply(input, weight, weight.geometry, bias) if _is_weight(weight) else NotImplemented


@implements(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
def _matmul(input: Any, other: Any, *, out: Any = None) -> Any:
    if out is not None or not _is_weight(other):
        return NotImplemented
    return _multiply(input, other, views.transposed(other.geometry), None)


@implements(torch.mm, torch.Tensor.mm)
def _mm(input: Any, mat2: Any, *, out: Any = None) -> Any:
    return _matmul(input, mat2, out=out) if input.dim() == 2 else NotImplemented


@implements(torch.addmm, torch.Tensor.addmm)
def _addmm(
    input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None
) -> Any:
    if out is not None or (beta, alpha) != (1, 1) or mat1.dim() != 2 or not _is_weight(mat2):
        return NotImplemented
    columns = views.transposed(mat2.geometry)
    if input.shape == (mat2.shape[1],):
        return _multiply(mat1, mat2, columns, input)
    product = _multiply(mat1, mat2, columns, None)
    return product if product is NotImplemented else product + input.to(product.dtype)


def _grouped_mm(
    x: Any, stack: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """transformers multiplies runs of tokens by an expert each: of the experts, only those that
    have tokens are decoded.
    """
    is_stack = isinstance(stack, QuantizedTensor) and stack.dim() == 3
    if not is_stack or x.dim() != 2 or offs is None or bias is not None:
        return NotImplemented
    out = x.new_zeros((len(x), stack.shape[2]), dtype=out_dtype or x.dtype)
    first = 0
    for expert, last in enumerate(offs.tolist()):
        if last > first:
            matrix = stack[expert]
            product = _matmul(x[first:last], matrix)
            if product is NotImplemented:
                product = x[first:last] @ matrix.dequantize()
            out[first:last] = product
        first = last
    return out


if (_GROUPED := _overload("_grouped_mm.default")) is not None:  # came with torch 2.8
    OPERATORS[_GROUPED] = _grouped_mm


def _is_weight(tensor: Any) -> bool:
    return isinstance(tensor, QuantizedTensor) and tensor.dim() == 2


def _multiply(x: Any, weight: QuantizedTensor, geometry: torch.Tensor, bias: Any) -> Any:
    # A product of two weights is one of matrices, not of an activation: it takes the exact values.
    if isinstance(x, (QuantizedTensor, torch.nn.Parameter)) or isinstance(bias, QuantizedTensor):
        return NotImplemented
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != geometry.shape[1]:
        return NotImplemented
    if views.is_transformed():
        # Kernels have no rules for these: they raise, or lose tangents without a word.
        return F.linear(x, type(weight)(weight.content, geometry, weight.dtype).dequantize(), bias)
    content = weight.rows_content(geometry)
    return NotImplemented if content is None else content.linear(x, bias)


@implements(torch.Tensor.__rmatmul__)
def _swapped(self: Any, other: Any) -> Any:
    return _matmul(other, self)


def _on_values(func: Callable[..., Any], tensor: Any, *args: Any, **kwargs: Any) -> Any:
    return func(as_dense(tensor), *args, **kwargs)


# Read out by torch below its dispatcher, where only real memory will do.
_READ_OUT = [getattr(torch.Tensor, name) for name in ("numpy", "tolist", "__array__", "__dlpack__")]
FUNCTIONS.update({func: functools.partial(_on_values, func) for func in _READ_OUT})


@implements(torch.Tensor.share_memory_)
def _share_memory(tensor: Any) -> Any:
    """What there is to share is the bytes: the tensor itself has no memory."""
    tensor.content.map(torch.Tensor.share_memory_)
    return tensor


@implements(torch.Tensor.is_shared)
def _is_shared(tensor: Any) -> bool:
    return all(part.is_shared() for part in tensor.content.tensors().values())
