"""Recipes that a quantized matrix can follow without touching its bytes.

TransformerLens' processing multiplies the columns of a matrix by `ln.w`, removes a mean over its
input and a mean over its output. A recipe made of these steps, of views and of casts is a
`QuantizedTensor` with a scale and two flags (`tl_fastload.quantized.content`). Any other step
needs the dequantized values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tl_fastload.errors import QuantizationError
from tl_fastload.quantized import views
from tl_fastload.quantized.formats.base import QuantizedBytes
from tl_fastload.quantized.tensor import QuantizedTensor
from tl_fastload.recipes.evaluate import evaluate, sources
from tl_fastload.recipes.nodes import Call, Node, Source, SourceView, aten, cast_but_last, meta_of
from tl_fastload.recipes.promise import Promise

_COPIES = (aten.clone.default, aten._to_copy.default, aten.detach.default)
_VIEWS = (
    *(aten.view.default, aten.permute.default, aten.transpose.int, aten.t.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.select.int, aten.slice.Tensor),
    aten._unsafe_view.default,
)


class QuantizedSource(Source):
    """A quantized matrix [out, in] as the start of recipes; who needs its values gets them
    dequantized.

    Args:
        load: gives the matrix; called again only after `release`.
        dtype: what it computes in.
        name: its name in the checkpoint.
        outline: its bytes on the meta device: their sizes and nothing else.
        home: the device where its bytes lie already; None if they have to be read.
        dense: nobody is to keep the bytes: what is read are ordinary weights.
    """

    def __init__(
        self,
        load: Callable[[], QuantizedTensor],
        dtype: torch.dtype,
        name: str,
        outline: QuantizedBytes,
        home: torch.device | None,
        *,
        dense: bool = False,
    ) -> None:
        super().__init__(name, torch.empty(outline.shape, dtype=dtype, device="meta"))
        self.dense = dense
        self._load = load
        self._matrix: QuantizedTensor | None = None
        self.outline = outline
        self.home = home

    def matrix(self) -> QuantizedTensor:
        """The matrix, read once for all recipes that need it."""
        if self._matrix is None:
            self._matrix = self._load()
        return self._matrix

    def release(self) -> None:
        """Let go of the bytes: parameters that hold them keep them."""
        self._matrix = None

    @classmethod
    def of(cls, tensor: QuantizedTensor, name: str) -> QuantizedSource:
        """A matrix in memory, whose bytes are shared."""
        stored = tensor.content.stored
        outline = stored.map(lambda part: part.to("meta"))
        return cls(lambda: tensor, tensor.dtype, name, outline, stored.device)

    def lend(self, geometry: torch.Tensor) -> torch.Tensor | None:
        # What a parameter is to own is read into memory of its own.
        return None if self.dense else self._view(geometry).dequantize()

    def read_into(
        self, out: torch.Tensor, geometry: torch.Tensor, casts: tuple[torch.dtype, ...]
    ) -> None:
        out.copy_(cast_but_last(self._view(geometry).dequantize(), casts))

    def _view(self, geometry: torch.Tensor) -> QuantizedTensor:
        return QuantizedTensor(self.matrix().content, geometry, self.dtype)


def promise_of_tensor(tensor: QuantizedTensor, name: str) -> Promise:
    """A promise of a quantized tensor in memory as it is now, under the name that messages give
    it.
    """
    # The bytes of a parameter may be replaced before the recipe is followed.
    held = QuantizedTensor(tensor.content, tensor.geometry, tensor.dtype)
    source = QuantizedSource.of(held, name)
    shown = torch.empty(source.shape, dtype=held.dtype, device="meta").as_strided(
        held.shape, held.stride(), held.storage_offset()
    )
    return Promise(SourceView(source, shown), shown, tensor.device)


def reads_quantized(node: Node) -> bool:
    """Whether a recipe starts from a quantized matrix that is to stay bytes."""
    read = (view.source for view in sources(node))
    return any(isinstance(source, QuantizedSource) and not source.dense for source in read)


def is_stored_quantized(node: Node) -> bool:
    """Whether a recipe starts from a quantized matrix, to stay bytes or not."""
    return any(isinstance(view.source, QuantizedSource) for view in sources(node))


def follow(node: Node, device: torch.device) -> QuantizedTensor:
    """The quantized tensor that a recipe describes, bytes untouched.

    Args:
        node: the recipe.
        device: where scales are computed.

    Raises:
        QuantizationError: the recipe takes a step that bytes cannot follow; says which.
    """
    if isinstance(node, SourceView) and isinstance(node.source, QuantizedSource):
        return QuantizedTensor(node.source.matrix().content, node.geometry, node.dtype)
    if not isinstance(node, Call):
        raise QuantizationError("its values come out of an operation with several results")
    first = node.args[0]
    if node.func in _COPIES:
        return follow(first, device)
    if node.func in _VIEWS:
        return _viewed(node, follow(first, device))
    if node.func in (aten.stack.default, aten.cat.default):
        return _joined(node, [follow(part, device) for part in first])
    second = node.args[1] if len(node.args) > 1 else None
    if node.func is aten.mul.Tensor and isinstance(second, Node) and not reads_quantized(second):
        matrix = follow(first, device)
        return matrix.scale_input(_input_scale(matrix, evaluate(second, device).tensor))
    if node.func is aten.sub.Tensor and isinstance(second, Node):
        return _less_its_mean(node, device)
    raise QuantizationError(f"{node.func} needs its values")


def _joined(node: Call, parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Several matrices as one, their rows copied: experts that transformers holds together."""
    packed = [part.packed_rows() for part in parts]
    axes = {_input_axis(part) for part in packed}
    axis, dim = next(iter(axes)), node.args[1] if len(node.args) > 1 else 0
    if len(axes) > 1 or axis is None:
        raise QuantizationError("it is put together of parts of rows")
    contents = [part.content for part in packed if part is not None]
    first = contents[0]
    if any(content.is_processed or content.in_shift is not None for content in contents):
        raise QuantizationError("it is put together of processed matrices")
    kinds = {(type(one.stored), one.stored.shape[1], one.compute_dtype) for one in contents}
    if len(kinds) > 1:
        raise QuantizationError("it is put together of matrices that are quantized in other ways")
    # The same is done with numbers of rows, in whose shapes the input has one number.
    shapes = [[1 if d == axis else n for d, n in enumerate(part.shape)] for part in parts]
    sizes = [math.prod(shape) for shape in shapes]
    numbers = torch.split(torch.arange(sum(sizes), device="cpu"), sizes)
    index = node.func([n.view(shape) for n, shape in zip(numbers, shapes, strict=True)], dim)
    is_stack = node.func is aten.stack.default
    if is_stack and dim % index.dim() <= axis:
        axis += 1
    elif not is_stack and dim % index.dim() == axis:
        raise QuantizationError("it is put together of parts of rows")
    stored = type(first.stored).joined([content.stored for content in contents])
    rows = index.movedim(axis, -1)
    stored = stored.rows(rows.flatten())
    geometry = views.whole(stored.shape).view(*rows.shape[:-1], stored.shape[1]).movedim(-1, axis)
    return QuantizedTensor(replace(first, stored=stored), geometry, parts[0].dtype)


def _input_axis(part: QuantizedTensor | None) -> int | None:
    """The one dimension along the input of a view whose rows lie in their order; else None."""
    if part is None:
        return None
    columns = part.content.stored.shape[1]
    order = part.geometry.stride()
    inputs = [d for d, n in enumerate(part.shape) if n == columns and order[d] == 1]
    if len(inputs) != 1:
        return None
    others = part.geometry.movedim(inputs[0], -1)
    return inputs[0] if others.is_contiguous() else None


def _viewed(node: Call, matrix: QuantizedTensor) -> QuantizedTensor:
    try:
        view: QuantizedTensor = node.func(matrix, *node.args[1:])
    except RuntimeError as error:
        # A copy in front of it was not made: whole rows can be, as with interleaved heads.
        rows = matrix.packed_rows()
        if rows is None:
            raise QuantizationError("a view needs its values in another order") from error
        view = node.func(rows, *node.args[1:])
    return view


def _input_scale(matrix: QuantizedTensor, factor: torch.Tensor) -> torch.Tensor:
    """A factor that is broadcast over a view of a matrix, as one number per input of the matrix."""
    columns = matrix.content.stored.shape[1]
    factor = factor.reshape((1,) * (matrix.dim() - factor.dim()) + tuple(factor.shape))
    inputs, outputs = _dims(matrix)
    if any(factor.shape[dim] != 1 for dim in outputs):
        raise QuantizationError("it is scaled by output, not by input")
    scale = torch.ones(columns, dtype=factor.dtype, device=factor.device)
    shape = [matrix.shape[dim] for dim in inputs]
    strides = [matrix.geometry.stride(dim) for dim in inputs]
    values = factor.permute(*inputs, *outputs).reshape([factor.shape[dim] for dim in inputs])
    scale.as_strided(shape, strides).copy_(values.expand(shape))
    return scale


def _dims(matrix: QuantizedTensor) -> tuple[list[int], list[int]]:
    """The dimensions of a view that walk along the matrix's input, and those along its output."""
    columns = matrix.content.stored.shape[1]
    inputs = [d for d in range(matrix.dim()) if matrix.geometry.stride(d) < columns]
    return inputs, [d for d in range(matrix.dim()) if d not in inputs]


def _less_its_mean(node: Call, device: torch.device) -> QuantizedTensor:
    mean = _unviewed(node.args[1])
    if not isinstance(mean, Call) or mean.func is not aten.mean.dim:
        raise QuantizationError("something else than its mean is subtracted from it")
    if not _is_same(_unviewed(mean.args[0]), _unviewed(node.args[0])):
        raise QuantizationError("the mean of another matrix is subtracted from it")
    matrix, averaged = follow(node.args[0], device), follow(mean.args[0], device)
    dims = {dim % averaged.dim() for dim in mean.args[1]}
    spread = [d for d, n in enumerate(meta_of(node.args[1]).shape) if n == 1]
    for side, center in ((0, matrix.center_input), (1, matrix.center_output)):
        # The mean runs over one whole side, and is subtracted along that side.
        over = {d for d in _dims(averaged)[side] if averaged.shape[d] > 1}
        along = {d for d in _dims(matrix)[side] if matrix.shape[d] > 1}
        others = {d for d in _dims(averaged)[1 - side] if averaged.shape[d] > 1}
        if over <= dims and not dims & others and along <= set(spread):
            return center()
    raise QuantizationError("the mean over a part of a side is subtracted from it")


def _unviewed(node: Any) -> Any:
    """The step behind copies and views that show all of it."""
    while isinstance(node, Call) and (node.func in _COPIES or _shows_all(node)):
        node = node.args[0]
    return node


def _is_same(one: Any, other: Any) -> bool:
    """Whether two steps have the same elements, perhaps in another order."""
    if isinstance(one, SourceView) and isinstance(other, SourceView):
        size = one.source.shape.numel()
        is_whole = one.geometry.numel() == size == other.geometry.numel()
        return one is other or (one.source is other.source and is_whole)
    return one is other


def _shows_all(node: Call) -> bool:
    if node.func not in _VIEWS or not isinstance(node.args[0], Node):
        return False
    return bool(meta_of(node.args[0]).numel() == node.meta.numel())
