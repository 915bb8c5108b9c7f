"""Evaluates one recipe with as little memory as its operations allow.

The result is bit for bit what running the recorded operations one after the other would give: the
same ATen operations run on values of the same strides. What is saved is memory: a value is
released at its last use, the first operand of an operation is evaluated last, and elementwise
operations write into their first operand when nothing else can see it. Sources (file pages, the
caller's tensors) are never written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tl_fastload.ground import compat
from tl_fastload.ground.cores import Cores
from tl_fastload.ground.geometry import dense_strides, span
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.recipes.nodes import Call, Node, Pick, SourceView, aten, meta_of
from tl_fastload.recipes.spares import LEAST_BYTES, Spares
from tl_fastload.recipes.widths import same_in_any_width

_IN_PLACE: dict[Any, Any] = {
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
}
_INTO: dict[Any, Any] = {
    aten.mul.Tensor: aten.mul.out,
    aten.add.Tensor: aten.add.out,
    aten.sub.Tensor: aten.sub.out,
    aten.div.Tensor: aten.div.out,
}
_REDUCTIONS = (
    aten.mean.default,
    aten.mean.dim,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.var.correction,
    aten.std.correction,
)
_COPIES = (aten.clone.default, aten._to_copy.default)
# What the process's settings (TF32, reduced precision) make less exact on some devices, and what
# their libraries factor otherwise than LAPACK.
_PRODUCTS = (
    aten.mm.default,
    aten.bmm.default,
    aten.mv.default,
    aten.dot.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.addmv.default,
)
_FACTORS = (aten._linalg_svd.default, aten.linalg_qr.default)


@dataclass
class Buffer:
    """Memory behind one or more values.

    Attributes:
        owned: allocated by this evaluation, so nobody else can see it.
        holders: values alive in it.
    """

    owned: bool
    holders: int = 0


@dataclass
class Value:
    """A tensor (or the tuple that an operation returned) and the memory it lies in."""

    tensor: Any
    buffer: Buffer


def evaluate(node: Node, device: torch.device) -> Value:
    """Evaluate one recipe on a device; `buffer.owned` of the result says whether its memory is the
    caller's now.
    """
    return Evaluation([node], device).value(node)


class Evaluation:
    """Evaluates recipes that share steps: each shared step runs once.

    Args:
        roots: the recipes; ask for the `value` of each exactly once, in this order for the least
            memory.
        device: where sources are read to and operations run; devices in the recipes are ignored.
        spares: where memory of values comes from, and goes to when nobody needs them any more.
        cores: shared with those that work ahead.
    """

    def __init__(
        self,
        roots: list[Node],
        device: torch.device,
        spares: Spares | None = None,
        cores: Cores | None = None,
    ) -> None:
        self.device = device
        self.spares = Spares() if spares is None else spares
        self.cores = Cores() if cores is None else cores
        self.uses: Counter[Node] = Counter()
        self.kept: dict[Node, Value] = {}
        # What another thread reads, or has read: a function gives the value.
        self.ahead: dict[Node, Callable[[], Value]] = {}
        # Views that a reduction reads: their strides decide the order of summation.
        self.spread: set[Node] = set()
        for root in roots:
            self._count(root)

    def _count(self, node: Node) -> None:
        self.uses[node] += 1
        if self.uses[node] > 1:
            return
        for operand in operands(node):
            if isinstance(node, Call) and node.func in _REDUCTIONS:
                self.spread.add(operand)
            self._count(operand)

    @torch.no_grad()
    def value(self, node: Node) -> Value:
        """The value of a node for one of its uses; the caller becomes a holder of its buffer."""
        self.uses[node] -= 1
        if node in self.kept:
            value = self.kept[node] if self.uses[node] else self.kept.pop(node)
            value.buffer.holders += bool(self.uses[node])
            return value
        value = self._compute(node)
        if self.uses[node]:
            self.kept[node] = value
            value.buffer.holders += 1
        return value

    def _compute(self, node: Node) -> Value:
        view = self._view_read_by(node)
        if view is not None:
            if view is not node:
                self.uses[view] -= 1
            return self.ahead.pop(node)() if node in self.ahead else self.read(node)
        if isinstance(node, Pick):
            several = self.value(node.call)
            return Value(several.tensor[node.index], several.buffer)
        if not isinstance(node, Call):
            raise TypeError(f"not a recipe: {node!r}")
        return self._run(node)

    def reads(self) -> dict[Node, SourceView]:
        """What `read` takes, in the order in which it is needed, and which view each reads."""
        seen: set[Node] = set()
        found: dict[Node, SourceView] = {}
        todo = list(reversed(self.uses))
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            view = self._view_read_by(node)
            if view is None:
                todo.extend(operands(node))  # the last operand is evaluated first
            else:
                seen.add(view)
                found[node] = view
        return found

    def _view_read_by(self, node: Node) -> SourceView | None:
        """The view that a node reads: itself, or what it casts, which then is read straight into
        the wider type: the narrow one is never held whole.
        """
        if isinstance(node, SourceView):
            return node
        if not isinstance(node, Call) or node.func is not aten._to_copy.default:
            return None
        view = node.args[0]
        if not isinstance(view, SourceView) or view in self.kept or view in self.spread:
            return None
        return view if self.uses[view] == 1 else None

    @torch.no_grad()
    def read(self, node: Node) -> Value:
        """The value of one of `reads`; another thread may ask for it ahead of time."""
        if isinstance(node, Call):
            view: SourceView = node.args[0]
            return self._read_into_new(view, (*view.casts, node.meta.dtype), node.meta.stride())
        return self._view(node)  # type: ignore[arg-type]

    def _view(self, view: SourceView) -> Value:
        if not view.casts:
            lent = view.source.lend(view.geometry)
            if lent is not None:
                moved = lent.to(self.device)
                is_own = moved is not lent or view.source.is_given
                return Value(moved, Buffer(owned=is_own, holders=1))
        if view in self.spread and dense_strides(view.geometry) != view.geometry.stride():
            return self._read_spread(view)
        return self._read_into_new(view, view.casts, dense_strides(view.geometry))

    def _read_spread(self, view: SourceView) -> Value:
        """Everything between the first and the last element, so that strides stay what they
        were.
        """
        geometry = view.geometry
        run = geometry.as_strided((span(geometry),), (1,), geometry.storage_offset())
        value = self._read_into_new(SourceView(view.source, run, view.casts), view.casts, (1,))
        value.tensor = value.tensor.as_strided(geometry.shape, geometry.stride(), 0)
        return value

    def _read_into_new(
        self, view: SourceView, casts: tuple[torch.dtype, ...], strides: tuple[int, ...]
    ) -> Value:
        dtype = casts[-1] if casts else view.source.dtype
        out = self.spares.empty(view.geometry.shape, strides, dtype=dtype, device=self.device)
        with self.cores.beside_helpers():
            view.source.read_into(out, view.geometry, casts)
        return Value(out, Buffer(owned=True, holders=1))

    def _run(self, node: Call) -> Value:
        # The first operand comes last: `x - x.mean()` has its small mean before `x` is consumed.
        values: dict[int, Value] = {}
        found = list(operands(node))
        for position in reversed(range(len(found))):
            values[position] = self.value(found[position])
        inputs = [values[position] for position in range(len(found))]
        arguments, kwargs = _fill(node, [value.tensor for value in inputs])
        with self._threads_for(node.func, arguments, kwargs):
            result = self._result(node, inputs, arguments, kwargs)
        buffer = self._buffer_of(result, inputs)
        buffer.holders += 1
        for value in inputs:
            self.let_go(value)
        return Value(result, buffer)

    def _threads_for(
        self, func: Any, arguments: list[Any], kwargs: dict[str, Any]
    ) -> AbstractContextManager[None]:
        if not self.cores.helpers:
            return nullcontext()
        if same_in_any_width(func, arguments, torch.get_num_threads(), kwargs):
            return self.cores.beside_helpers()
        return self.cores.alone()

    def _result(
        self, node: Call, inputs: list[Value], arguments: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        if inputs and self._may_write(node, inputs):
            if node.func not in _COPIES:
                _IN_PLACE[node.func](*arguments, **kwargs)
            return inputs[0].tensor
        if node.func in _PRODUCTS or node.func in _FACTORS:
            return _exactly(node.func, arguments, kwargs)
        if not self._fits_block(node, inputs):
            return node.func(*arguments, **kwargs)
        meta = node.meta
        result = self.spares.empty(meta.shape, meta.stride(), dtype=meta.dtype, device=self.device)
        if node.func in _COPIES:
            result.copy_(inputs[0].tensor)
        else:
            _INTO[node.func](*arguments, **kwargs, out=result)
        return result

    def let_go(self, value: Value) -> None:
        """A holder of a value is done with it."""
        value.buffer.holders -= 1
        if value.buffer.owned and not value.buffer.holders:
            value.buffer.owned = False
            self.spares.keep(value.tensor)

    def _fits_block(self, node: Call, inputs: list[Value]) -> bool:
        """Whether a large result has the form that was recorded, and an operation fills it."""
        if node.func not in _INTO and node.func not in _COPIES:
            return False
        if self.device.type != "cpu" or bytes_of(node.meta) < LEAST_BYTES:
            return False
        return all(
            type(value.tensor) is torch.Tensor
            and value.tensor.shape == meta_of(operand).shape
            and value.tensor.stride() == meta_of(operand).stride()
            for operand, value in zip(operands(node), inputs, strict=True)
        )

    def _may_write(self, node: Call, inputs: list[Value]) -> bool:
        if node.func not in _IN_PLACE and node.func not in _COPIES:
            return False
        first = inputs[0]
        return (
            first.buffer.owned
            and first.buffer.holders == 1
            and first.tensor.shape == node.meta.shape
            and first.tensor.dtype == node.meta.dtype
            and first.tensor.stride() == node.meta.stride()
        )

    def _buffer_of(self, result: Any, inputs: list[Value]) -> Buffer:
        several = not isinstance(result, torch.Tensor)
        storages = {part.untyped_storage()._cdata for part in (result if several else [result])}
        for value in inputs:
            tensors = [value.tensor] if isinstance(value.tensor, torch.Tensor) else value.tensor
            if any(tensor.untyped_storage()._cdata in storages for tensor in tensors):
                return value.buffer
        # Several results may lie in one another's memory: never written, nobody's own.
        return Buffer(owned=not several)


def _exactly(func: Any, arguments: list[Any], kwargs: dict[str, Any]) -> Any:
    """A product or a factorization whose numbers follow no setting of the process: on the CPU,
    and where that may multiply float32 in fewer bits, in float64.
    """
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    home, dtype = tensors[0].device, tensors[0].dtype
    wide = dtype
    if func in _PRODUCTS and dtype == torch.float32 and compat.multiplies_in_fewer_bits():
        wide = torch.float64
    if home.type == "meta" or (home.type == "cpu" and wide == dtype):
        return func(*arguments, **kwargs)
    moved = [
        x.to("cpu", wide if x.dtype == dtype else x.dtype) if isinstance(x, torch.Tensor) else x
        for x in arguments
    ]
    made = func(*moved, **kwargs)
    if isinstance(made, torch.Tensor):
        return made.to(home, dtype)
    return tuple(x.to(home) for x in made)


def operands(node: Node) -> list[Node]:
    """The nodes that a node takes, in the order of its arguments."""
    if isinstance(node, Pick):
        return [node.call]
    if not isinstance(node, Call):
        return []
    found: list[Node] = []
    for argument in (*node.args, *node.kwargs.values()):
        if isinstance(argument, Node):
            found.append(argument)
        elif isinstance(argument, (tuple, list)):
            found.extend(x for x in argument if isinstance(x, Node))
    return found


def sources(node: Node) -> list[SourceView]:
    """Every source view that a recipe reads, each once."""
    return [found for found in _steps(node) if isinstance(found, SourceView)]


def rounds_otherwise(node: Node, recorded: torch.device, device: torch.device) -> bool:
    """Whether evaluating a recipe may round otherwise than the recorded operations would have.

    Args:
        node: the recipe.
        recorded: where its operations were.
        device: where it is evaluated: what is elementwise is the same everywhere, a sum is not.
    """
    funcs = set() if recorded.type == device.type else {*_REDUCTIONS}
    if recorded.type != "cpu":
        funcs |= {*_PRODUCTS, *_FACTORS}
    return bool(funcs) and any(isinstance(x, Call) and x.func in funcs for x in _steps(node))


def _steps(node: Node) -> list[Node]:
    seen: dict[Node, None] = {}
    todo = [node]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen[current] = None
            todo.extend(operands(current))
    return list(seen)


def _fill(node: Call, tensors: list[torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call with tensors in place of nodes, and without devices: there is one
    device.
    """
    remaining = iter(tensors)
    arguments = [_filled(argument, remaining) for argument in node.args]
    kwargs = {k: _filled(v, remaining) for k, v in node.kwargs.items() if k != "device"}
    return arguments, kwargs


def _filled(argument: Any, remaining: Iterator[torch.Tensor]) -> Any:
    # Not a closure that calls itself: such a cycle would keep the tensors alive until the next
    # collection.
    if isinstance(argument, Node):
        return next(remaining)
    if isinstance(argument, (tuple, list)):
        return type(argument)(_filled(x, remaining) for x in argument)
    return argument
