"""Promises that stand in a model in place of its parameters: they may be written to, and say which
of them lie in one another's memory.
"""

from __future__ import annotations

from typing import Any

import torch

from tl_fastload.errors import RecordingError
from tl_fastload.recipes.evaluate import evaluate
from tl_fastload.recipes.nodes import MemorySource, SourceView, aten
from tl_fastload.recipes.promise import Promise, node_of

# What writes into its first operand -> the same without writing.
_WITHOUT_WRITING: dict[Any, Any] = {
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.mul_.Scalar: aten.mul.Scalar,
    aten.div_.Tensor: aten.div.Tensor,
    aten.div_.Scalar: aten.div.Scalar,
    aten.add_.Tensor: aten.add.Tensor,
    aten.add_.Scalar: aten.add.Scalar,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.sub_.Scalar: aten.sub.Scalar,
}
_WRITES = {*_WITHOUT_WRITING, aten.copy_.default, aten.fill_.Scalar, aten.zero_.default}


class Memory:
    """The memory that values of promises would lie in.

    Attributes:
        version: how often it was written to.
        written: the promise through which it was, all of it, the last time.
    """

    def __init__(self) -> None:
        self.version = 0
        self.written: Promise | None = None


class LivePromise(Promise):
    """A promise that can be a model's parameter while code that changes the model runs on it.

    A write through it gives it another recipe, which other promises of the same elements take
    over when they are looked at. A view that is looked at then is a RecordingError: it has the
    recipe of before.

    Attributes:
        home: the memory that its value would lie in; views share it, copies have their own.
    """

    home: Memory
    seen: int
    _is_param: bool = False  # how nn.Parameter recognises tensor subclasses

    @staticmethod
    def __new__(cls, *args: Any) -> LivePromise:
        promise: Any = Promise.__new__(cls, *args)
        promise.home = Memory()
        promise.seen = 0
        made: LivePromise = promise
        return made

    @property
    def data(self) -> LivePromise:
        """As of any tensor: the same memory, without gradients."""
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        live = _alive(value)
        if live.shape != self.shape or live.dtype != self.dtype:
            raise RecordingError(
                f"`.data = ` gives a recorded parameter {tuple(self.shape)}, {self.dtype} another "
                f"shape or dtype: {tuple(live.shape)}, {live.dtype}. Load the model first."
            )
        self.node, self.meta, self.home, self.seen = live.node, live.meta, live.home, live.seen

    def data_ptr(self) -> int:
        """A number that two promises share if their values start in the same place."""
        return id(self.home) + int(self.meta.storage_offset()) * self.meta.element_size()

    @property
    def fills_home(self) -> bool:
        """Whether nothing but this value lies in its memory."""
        return self.meta.numel() * self.meta.element_size() == self.meta.untyped_storage().nbytes()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for x in args:
            for one in x if isinstance(x, (list, tuple)) else (x,):
                if isinstance(one, LivePromise):
                    one.require_fresh()
        if func in _WRITES and isinstance(args[0], LivePromise):
            return _write(func, args, kwargs or {})
        if func._schema.is_mutable and not isinstance(args[0], Promise):
            # A tensor with values takes values: they are read now.
            return func(*(_valued(x) for x in args), **(kwargs or {}))
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if args and isinstance(args[0], LivePromise):
            for one in made if isinstance(made, (list, tuple)) else (made,):
                if isinstance(one, LivePromise) and _share_storage(one.meta, args[0].meta):
                    one.home, one.seen = args[0].home, args[0].seen
        return made

    def require_fresh(self) -> None:
        """Take over what was written to its memory through another promise.

        Raises:
            RecordingError: it is a view of a part, or of another form.
        """
        if self.seen != self.home.version:
            written = self.home.written
            if written is not None and _is_formed_alike(self.meta, written.meta):
                self.node, self.seen = written.node, self.home.version
                return
            raise RecordingError(
                "A recorded parameter was written to, and a view of it from before is used "
                "afterwards: its recipe would be that of the old values. Load the model first."
            )


def _valued(x: Any) -> Any:
    return evaluate(x.node, x.device).tensor if isinstance(x, Promise) else x


def _alive(tensor: Any) -> LivePromise:
    if isinstance(tensor, LivePromise):
        return tensor
    made = node_of(tensor)
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return LivePromise(made, meta, tensor.device)


def _share_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _is_formed_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.shape == other.shape
        and one.stride() == other.stride()
        and bool(one.storage_offset() == other.storage_offset())
    )


def _write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LivePromise:
    """Give a promise the recipe of what is written to it."""
    target: LivePromise = args[0]
    if func is aten.copy_.default and _is_same(target, args[1]):
        return target
    if not target.fills_home:
        raise RecordingError(
            f"{func} writes into a part of a recorded parameter. Load the model first, then "
            "change it."
        )
    # Inside a dispatch, `to` and `contiguous` would arrive here as they are, and look like views.
    value: Any = _alive(_values(func, args, kwargs))
    if value.dtype != target.dtype:
        value = aten._to_copy.default(value, dtype=target.dtype)
    if value.shape != target.shape:
        value = aten.expand.default(value, list(target.shape))
    if value.stride() != target.stride():
        if not target.is_contiguous():
            raise RecordingError(f"{func} writes values of other strides than the parameter's.")
        value = aten.clone.default(value, memory_format=torch.contiguous_format)
    target.node = node_of(value)
    target.home.version += 1
    target.home.written = target
    target.seen = target.home.version
    return target


def _values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    target = args[0]
    if func is aten.copy_.default:
        found: torch.Tensor = args[1]
        return found
    if func in (aten.fill_.Scalar, aten.zero_.default):
        number = args[1] if len(args) > 1 else 0
        return torch.full(target.shape, number, dtype=target.dtype, device="cpu")
    made: torch.Tensor = _WITHOUT_WRITING[func](*args, **kwargs)
    return made


def _is_same(one: Promise, other: Any) -> bool:
    """Whether two promises are the same elements of one stored tensor."""
    a, b = one.node, other.node if isinstance(other, Promise) else None
    if not (isinstance(a, SourceView) and isinstance(b, SourceView)):
        return a is b
    return a.source is b.source and a.casts == b.casts and _is_formed_alike(a.geometry, b.geometry)


def live_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, LivePromise]:
    """Promises of tensors in memory; those that lie in one memory share a home.

    Args:
        tensors: by the name that messages give them; one tensor under two names has two promises
            of one home.
    """
    sources: dict[tuple[int, torch.dtype], tuple[MemorySource, torch.Tensor, Memory]] = {}
    made: dict[str, LivePromise] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        key = storage._cdata, tensor.dtype
        if key not in sources:
            count = storage.nbytes() // tensor.element_size()
            flat = tensor.detach().as_strided((count,), (1,), 0)
            form = torch.empty(count, dtype=tensor.dtype, device="meta")
            sources[key] = MemorySource(flat, name), form, Memory()
        source, form, home = sources[key]
        geometry = form.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        promise = LivePromise(SourceView(source, geometry), geometry, tensor.device)
        promise.home = home
        promise.requires_grad_(tensor.requires_grad)
        made[name] = promise
    return made
