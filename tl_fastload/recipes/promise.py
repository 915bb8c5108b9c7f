"""A tensor that records what is done to it instead of doing it.

TransformerLens' own converters and weight processing run on `Promise` tensors unmodified: a
promise knows its shape, strides, dtype and device, and every operation on it gives another promise
that holds a small recipe (`tl_fastload.recipes.nodes`). Recipes are evaluated later, one parameter
at a time, by `tl_fastload.recipes.evaluate`; here only where Python asks for a number (`.item()`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from tl_fastload.errors import RecordingError
from tl_fastload.recipes.evaluate import evaluate
from tl_fastload.recipes.nodes import (
    Call,
    MemorySource,
    Node,
    Pick,
    Source,
    SourceView,
    aten,
    dtype_of,
    meta_of,
    shape_of,
)

_CPU = torch.device("cpu")

# A cast there and back changes nothing when the type in between holds every value exactly.
_HOLDS = {
    torch.float32: (torch.float16, torch.bfloat16),
    torch.float64: (torch.float16, torch.bfloat16, torch.float32),
}


class Memory(Protocol):
    """Counts what recorded operations would allocate if they ran."""

    def follow(self, args: tuple[Any, ...], made: Any, is_view: bool) -> None:
        """Take note of an operation: what it takes, what it makes, whether that is a view."""


class Promise(torch.Tensor):
    """A tensor whose values do not exist yet.

    Attributes:
        node: the recipe.
        meta: meta tensor of the same shape, strides and dtype, on which results are inferred.
        memory: who counts the memory that its value would take; None if nobody does.
        is_trained: whether the parameter that it is the value of has gradients.
    """

    node: Node
    meta: torch.Tensor
    memory: Memory | None = None
    is_trained: bool = False

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, node: Node, meta: torch.Tensor, device: torch.device) -> Promise:
        promise: Promise = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device
        )
        promise.node = node
        promise.meta = meta
        return promise

    def __init__(self, *args: Any) -> None:
        # torch.Tensor.__init__ takes no arguments of a subclass.
        pass

    @classmethod
    def of(cls, source: Source, device: torch.device = _CPU) -> Promise:
        """The promise of a whole source."""
        geometry = torch.empty_strided(
            source.shape, source.stride, dtype=source.dtype, device="meta"
        )
        return cls(SourceView(source, geometry), geometry, device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch passes no kwargs at times
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _record(cls, func, args, kwargs or {})

    def __isub__(self, other: Any) -> Promise:  # type: ignore[misc]
        """`state_dict[name] -= mean`, as TransformerLens 2 has it: the name gets a new promise.

        Raises RecordingError where somebody else may see the memory that is written to.
        """
        if not isinstance(self.node, Call) or _kind_of(self.node.func).is_view:
            raise RecordingError(
                "`-=` writes into a stored tensor, or into a view of another one, whose values are "
                "not loaded yet. Load the model first, then change it."
            )
        less: Promise = (self - other).to(self.dtype)
        return less

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        kind = type(self.node).__name__
        return f"Promise(shape={tuple(self.shape)}, dtype={self.dtype}, node={kind})"


def node_of(tensor: torch.Tensor) -> Node:
    """The recipe of a tensor; a real tensor's recipe is itself."""
    if isinstance(tensor, Promise):
        return tensor.node
    # A copy: the caller may change its tensor before the recipe is evaluated.
    return Promise.of(MemorySource(tensor.clone()), tensor.device).node


def _record(cls: type[Promise], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    refusal = _kind_of(func).refusal
    if refusal is not None:
        raise RecordingError(refusal)
    if func is aten._local_scalar_dense.default:
        return evaluate(args[0].node, torch.device("cpu")).tensor.item()
    device = kwargs.get("device") or _device_of(args)
    form = _form(args), _form(kwargs) if kwargs else (), torch.get_default_dtype()
    meta = _inferred(cls, func, args, kwargs, form)
    if isinstance(meta, (tuple, list)):
        return _record_several(cls, func, args, kwargs, meta, device)
    if not isinstance(meta, torch.Tensor):
        return meta
    node = _simplify(func, args, kwargs, meta, form)
    if node is None and (part := _one_of_interleaved(func, args)) is not None:
        node = part
        meta = torch.empty_like(meta_of(part), dtype=dtype_of(part))  # other strides, and truly so
    node = node or _call(func, args, kwargs, meta)
    return _followed(func, args, cls(node, meta, torch.device(device)))


class _Kind(NamedTuple):
    """What is asked of an operation again and again.

    Attributes:
        func: the operation; held, so that no other has its `id`.
        refusal: why it cannot be recorded, or None.
        takes_views: whether a result may lie in an argument's memory.
        is_view: whether its result is other elements of its operand.
    """

    func: Any
    refusal: str | None
    takes_views: bool
    is_view: bool


_KINDS: dict[int, _Kind] = {}  # by `id`: torch's operations compute their hash in Python


def _kind_of(func: Any) -> _Kind:
    known = _KINDS.get(id(func))
    if known is None:
        takes_views = any(one.alias_info is not None for one in func._schema.arguments)
        # aten.view.dtype reinterprets bytes: its geometry is not one of the source's elements.
        is_view = takes_views and func is not aten.view.dtype
        known = _KINDS[id(func)] = _Kind(func, _refusal(func), takes_views, is_view)
    return known


def _refusal(func: Any) -> str | None:
    if torch.Tag.nondeterministic_seeded in func.tags:
        return f"{func} draws random numbers, which a recipe cannot hold. Load the model first."
    if func is aten.as_strided.default:
        return "as_strided reads memory, and a recorded tensor has none. Use slices and views."
    if func._schema.is_mutable:
        return (
            f"{func} writes into a tensor whose values are not loaded yet. Load the model first, "
            "then change it."
        )
    return None


# What torch found out on the meta device, by all that it depends on: layers are much alike, and
# nothing writes to what is found, so that they share it.
_FORMS: dict[Any, torch.Tensor] = {}
_MOST_FORMS = 4096


def _inferred(
    cls: type[Promise], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], form: Any
) -> Any:
    """What an operation returns, without values.

    Args:
        cls: the class of its results.
        func: the operation.
        args: what it takes.
        kwargs: likewise.
        form: what of these decides.
    """
    key = None
    if cls is Promise or not _kind_of(func).takes_views:
        key = (id(func), form)
        known = _FORMS.get(key)
        if known is not None and cls is Promise:
            return known
        if known is not None:  # metas of others share memory where values would, and nowhere else
            return torch.empty_strided(
                known.shape, known.stride(), dtype=known.dtype, device="meta"
            )
    meta_kwargs = {**kwargs, "device": torch.device("meta")} if "device" in kwargs else kwargs
    meta = func(*_mapped(_to_meta, args), **_mapped(_to_meta, meta_kwargs))
    if key is not None and isinstance(meta, torch.Tensor):
        _remember(key, meta)
    return meta


def _remember(key: Any, meta: torch.Tensor) -> None:
    if len(_FORMS) >= _MOST_FORMS:
        _FORMS.clear()
    _FORMS[key] = meta


def _geometry(
    func: Any, view: SourceView, args: tuple[Any, ...], kwargs: dict[str, Any], form: Any
) -> torch.Tensor:
    """Which elements of a source a view of a view of it shows."""
    seen = view.geometry
    place = seen.shape, seen.stride(), seen.dtype, seen.storage_offset()
    key = (id(func), place, form[0][1:], form[1])
    known = _FORMS.get(key)
    if known is None:
        known = func(seen, *args[1:], **kwargs)
        _remember(key, known)
    return known


def _form(x: Any) -> Any:
    """What of an argument decides the form of a result, as a key: 1, 1.0 and True are three."""
    if isinstance(x, (tuple, list)):
        return tuple([_form(value) for value in x])
    if isinstance(x, torch.Tensor):
        seen = x.meta if isinstance(x, Promise) else x
        return (seen.shape, seen.stride(), seen.dtype)
    if isinstance(x, dict):
        return tuple((key, _form(value)) for key, value in x.items())
    return type(x), x


def _record_several(
    cls: type[Promise],
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    metas: Any,
    device: Any,
) -> Any:
    if _kind_of(func).is_view and isinstance(args[0].node, SourceView):
        view = args[0].node
        parts = func(view.geometry, *args[1:], **kwargs)
        nodes: list[Node] = [SourceView(view.source, part, view.casts) for part in parts]
    else:
        call = _call(func, args, kwargs, metas)
        nodes = [Pick(call, index) for index in range(len(metas))]
    promises = [
        cls(node, meta, torch.device(device)) for node, meta in zip(nodes, metas, strict=True)
    ]
    return _followed(func, args, promises if isinstance(metas, list) else tuple(promises))


def _followed(func: Any, args: tuple[Any, ...], made: Any) -> Any:
    """What an operation made, after who counts memory has been told."""
    memory = _memory_of(args)
    if memory is not None:
        is_view = func is aten._unsafe_view.default or _kind_of(func).is_view
        memory.follow(args, made, is_view)
    return made


def _memory_of(args: Any) -> Memory | None:
    for x in args:
        found = _memory_of(x) if isinstance(x, (tuple, list)) else getattr(x, "memory", None)
        if found is not None:
            return found
    return None


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], meta: Any) -> Call:
    return Call(func, _mapped(_to_node, args), _mapped(_to_node, kwargs), meta)


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """Apply a function to the leaves of an operation's arguments, which nest in lists at most."""
    if isinstance(x, dict):
        return {key: _mapped(function, value) for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)([_mapped(function, value) for value in x])
    return function(x)


def _to_node(x: Any) -> Any:
    return node_of(x) if isinstance(x, torch.Tensor) else x


def _to_meta(x: Any) -> Any:
    if isinstance(x, Promise):
        return x.meta
    if isinstance(x, torch.Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return x


def _device_of(args: Any) -> torch.device:
    for x in args:
        if isinstance(x, (tuple, list)):
            return _device_of(x)
        if isinstance(x, Promise):
            return x.device
    return torch.device("cpu")


def _simplify(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], meta: torch.Tensor, form: Any
) -> Node | None:
    """A shorter recipe with the same values, or None."""
    node = args[0].node if isinstance(args[0], Promise) else None
    if isinstance(node, SourceView):
        if _kind_of(func).is_view:
            geometry = _geometry(func, node, args, kwargs, form)
            return SourceView(node.source, geometry, node.casts)
        same_layout = meta.stride() == node.geometry.stride()
        if func is aten.clone.default and same_layout:
            return node
        if func is aten._to_copy.default and same_layout:
            return SourceView(node.source, node.geometry, _shorten(node, meta.dtype))
    if isinstance(node, Call) and func in (aten.clone.default, aten._to_copy.default):
        return _copied_already(node, meta)
    if isinstance(node, Call) and func in (aten.select.int, aten.slice.Tensor):
        found = _look_inside(node, func, args, meta)
        if found is None or dtype_of(found) != meta.dtype:
            return None
        return found if meta_of(found).stride() == meta.stride() else None
    return None


def _copied_already(node: Call, meta: torch.Tensor) -> Node | None:
    """The step that has the values of a copy of a step, in memory that is not a part of another's:
    that step itself, or what it made wider, if the copy is as narrow as before.
    """
    found: Node = node
    if node.meta.dtype != meta.dtype:
        is_cast = node.func is aten._to_copy.default
        if not is_cast or meta.dtype not in _HOLDS.get(node.meta.dtype, ()):
            return None
        found = node.args[0]
    if dtype_of(found) != meta.dtype or meta_of(found).stride() != meta.stride():
        return None
    is_part = isinstance(found, Call) and _kind_of(found.func).takes_views
    return None if is_part or isinstance(found, Pick) else found


def _shorten(node: SourceView, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The casts of `node` followed by `dtype`, without those that change no value."""
    chain = [node.source.dtype, *node.casts]
    if chain[-1] == dtype:
        return node.casts
    if len(chain) >= 2 and chain[-2] == dtype and dtype in _HOLDS.get(chain[-1], ()):
        return tuple(chain[1:-1])
    return (*node.casts, dtype)


def _look_inside(node: Call, func: Any, args: tuple[Any, ...], meta: torch.Tensor) -> Node | None:
    """One expert of stacked experts is that expert's own tensor: do not stack them all to take one
    out.
    """
    if node.func not in (aten.stack.default, aten.cat.default):
        return None
    is_cat = node.func is aten.cat.default
    if is_cat and len({len(shape_of(_as_node(part))) for part in node.args[0]}) > 1:
        return None  # it skips empty vectors
    dim = args[1] if len(args) > 1 else 0
    dim = dim % args[0].dim()
    if func is aten.select.int:
        index = args[2] % args[0].shape[dim]
        return _select_inside(node, dim, index, meta)
    start, end, step = (*args[2:], None, None, None)[:3]
    size = args[0].shape[dim]
    start = 0 if start is None else max(0, start + size if start < 0 else start)
    end = size if end is None else min(size, end + size if end < 0 else end)
    if step not in (None, 1):
        return None
    if (start, end) == (0, size):
        return node
    if is_cat and _dim_of(node) == dim:
        position = 0
        for part in node.args[0]:
            length = shape_of(part)[dim]
            if (position, position + length) == (start, end):
                return _as_node(part)
            position += length
    return None


def _one_of_interleaved(func: Any, args: tuple[Any, ...]) -> Node | None:
    """Of n tensors that were stacked in a last dimension and flattened, every n-th element is one
    of them: gpt-oss asks for columns of two matrices that a GGUF file has apart.
    """
    node = args[0].node if isinstance(args[0], Promise) else None
    if func is not aten.slice.Tensor or not isinstance(node, Call) or len(args) < 5:
        return None
    stack = node.args[0] if node.func in (aten.view.default, aten._unsafe_view.default) else None
    if not isinstance(stack, Call) or stack.func is not aten.stack.default:
        return None
    shape, count = shape_of(stack), len(stack.args[0])
    dim, start, end, step = args[1:5]
    is_flat = shape_of(node) == (*shape[:-2], shape[-2] * count)
    if _dim_of(stack) != len(shape) - 1 or not is_flat or dim % args[0].dim() != len(shape) - 2:
        return None
    is_each = step == count and 0 <= start < count and end >= args[0].shape[-1]
    return _as_node(stack.args[0][start]) if is_each else None


def _select_inside(node: Call, dim: int, index: int, meta: torch.Tensor) -> Node | None:
    if node.func is aten.stack.default:
        return _as_node(node.args[0][index]) if _dim_of(node) == dim else None
    if node.func is aten.cat.default and _dim_of(node) != dim:
        parts = [_selected(_as_node(part), dim, index) for part in node.args[0]]
        joined = _dim_of(node) - (1 if _dim_of(node) > dim else 0)
        return Call(aten.cat.default, (parts, joined), {}, meta)
    return None


def _selected(node: Node, dim: int, index: int) -> Node:
    part = Promise(
        node, torch.empty(shape_of(node), dtype=dtype_of(node), device="meta"), torch.device("cpu")
    )
    return node_of(torch.select(part, dim, index))


def _dim_of(node: Call) -> int:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return int(dim % node.meta.dim())


def _as_node(part: Any) -> Node:
    return part if isinstance(part, Node) else node_of(part)
