"""Recipes: what was recorded, as a graph, and where its values come from.

A recipe is a graph of three kinds of node: `SourceView` (elements of one stored tensor, seen
through views and casts), `Call` (one ATen operation) and `Pick` (one result of an operation that
returns several).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

aten = torch.ops.aten
PIECE_ELEMENTS = 2 << 20
_CASTING = ("cuda",)  # devices that get values as they are, and cast them


class Source(ABC):
    """A stored tensor that recipes start from: a range of a file, or a tensor that somebody else
    holds.

    Args:
        name: for messages.
        like: has its shape, strides and dtype.

    Attributes:
        reads_ahead: whether another thread may read it, before it is needed.
        is_given: whether what it lends becomes the reader's, who may write to it.
    """

    reads_ahead = False
    is_given = False

    def __init__(self, name: str, like: torch.Tensor) -> None:
        self.name = name
        self.shape = like.shape
        self.stride = like.stride()
        self.dtype = like.dtype

    @abstractmethod
    def read_into(
        self, out: torch.Tensor, geometry: torch.Tensor, casts: tuple[torch.dtype, ...]
    ) -> None:
        """Copy the elements that `geometry` (a meta view of this source) selects into `out`,
        casting on the way.
        """

    def stop(self) -> None:
        """Have a read that another thread is in end soon."""
        return

    @abstractmethod
    def lend(self, geometry: torch.Tensor) -> torch.Tensor | None:
        """The selected elements without a copy (the result is never written to, unless it
        `is_given`), or None if that is not possible.
        """


class MemorySource(Source):
    """A tensor in memory that belongs to somebody else: read, never written."""

    def __init__(self, tensor: torch.Tensor, name: str = "") -> None:
        super().__init__(name, tensor)
        self.tensor = tensor.detach()

    def lend(self, geometry: torch.Tensor) -> torch.Tensor | None:
        return self._view(geometry)

    def _view(self, geometry: torch.Tensor) -> torch.Tensor:
        offset = self.tensor.storage_offset() + geometry.storage_offset()
        return self.tensor.as_strided(geometry.shape, geometry.stride(), offset)

    def read_into(
        self, out: torch.Tensor, geometry: torch.Tensor, casts: tuple[torch.dtype, ...]
    ) -> None:
        value = self._view(geometry)
        pieces = [(value, out)]
        # torch casts on the host what goes to a device; some devices lack dtypes to cast from.
        is_cast_there = bool(casts) and value.device.type == "cpu" and out.device.type in _CASTING
        if (len(casts) > 1 or is_cast_there) and value.dim() and type(value) is torch.Tensor:
            # In pieces: what lies between two casts, or devices, is never held whole.
            slowest = max(range(value.dim()), key=value.stride)
            least = PIECE_ELEMENTS * value.shape[slowest] // max(value.numel(), 1)
            cut = max(least, 1), slowest
            pieces = list(zip(torch.split(value, *cut), torch.split(out, *cut), strict=True))
        for piece, target in pieces:
            sent = piece.to(out.device) if is_cast_there else piece
            target.copy_(cast_but_last(sent, casts))


def cast_but_last(tensor: torch.Tensor, casts: tuple[torch.dtype, ...]) -> torch.Tensor:
    """A tensor cast through all dtypes but the last, to which writing it casts."""
    for dtype in casts[:-1]:
        tensor = tensor.to(dtype)
    return tensor


class Node:
    """One step of a recipe."""

    __slots__ = ()


@dataclass(eq=False, slots=True)
class SourceView(Node):
    """Elements of a source, seen through views, then cast.

    Attributes:
        source: where the values come from.
        geometry: meta tensor; its shape, strides and offset select elements of the source's
            storage.
        casts: dtypes to cast through, in order; empty for the stored dtype.
    """

    source: Source
    geometry: torch.Tensor
    casts: tuple[torch.dtype, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return self.casts[-1] if self.casts else self.source.dtype


@dataclass(eq=False, slots=True)
class Call(Node):
    """One ATen operation. `args` and `kwargs` hold nodes where the operation took tensors."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: Any = field(repr=False)


@dataclass(eq=False, slots=True)
class Pick(Node):
    """One of the tensors that a call returns."""

    call: Call
    index: int


def meta_of(node: Node) -> torch.Tensor:
    """A meta tensor with the shape and strides that a node's value has (for a cast view: before
    the cast).
    """
    if isinstance(node, SourceView):
        return node.geometry
    if isinstance(node, Pick):
        picked: torch.Tensor = node.call.meta[node.index]
        return picked
    meta: torch.Tensor = node.meta  # type: ignore[attr-defined]
    return meta


def shape_of(node: Node) -> torch.Size:
    """The shape of a node's value."""
    return meta_of(node).shape


def dtype_of(node: Node) -> torch.dtype:
    """The dtype of a node's value."""
    return node.dtype if isinstance(node, SourceView) else meta_of(node).dtype


def as_stored(node: Node) -> Node:
    """The view of a source below copies and casts that leave every value what it is (bfloat16 to
    float32 and back); the node itself where there is none.
    """
    below, through = node, set[torch.dtype]()
    while isinstance(below, Call) and below.func in (aten.clone.default, aten._to_copy.default):
        through.add(below.meta.dtype)
        below = below.args[0]
    if not isinstance(below, SourceView):
        return node
    stored = below.source.dtype
    if not stored.is_floating_point or dtype_of(node) != stored:
        return node
    through.update(below.casts)
    through.discard(stored)
    if any(torch.promote_types(stored, dtype) != dtype for dtype in through):
        return node
    return SourceView(below.source, below.geometry)
