"""A part of a recipe's value, from the parts of what it takes: what is outside of the part is
neither read nor computed.

The numbers are those of the whole value: only operations whose elements do not depend on how many
of them are computed at once are cut. What sums (its order of summation follows the shape) or
multiplies matrices is evaluated whole, and the part is taken out of the result.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from tl_fastload.recipes.nodes import Call, Node, aten, dtype_of, meta_of, shape_of
from tl_fastload.recipes.promise import Promise

_ELEMENTWISE = {
    *(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar),
    *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar),
    *(aten.neg.default, aten.sqrt.default, aten.reciprocal.default, aten.where.self),
    *(aten.clone.default, aten._to_copy.default, aten.detach.default, aten.alias.default),
    *(aten.ones_like.default, aten.zeros_like.default),
}
"""Each element is rounded once, so that it is the same in vectors and alone."""

_VIEWS = (aten.view.default, aten._unsafe_view.default)


class Slices:
    """Takes parts of recipes. Recipes that share steps go on sharing them."""

    def __init__(self) -> None:
        self._made: dict[tuple[Node, int, int, int], Node] = {}

    def narrowed(self, node: Node, dim: int, start: int, length: int) -> Node:
        """The recipe of `value.narrow(dim, start, length)`."""
        if length == shape_of(node)[dim]:
            return node
        key = (node, dim, start, length)
        if key not in self._made:
            made = self._inside(node, *key[1:]) if isinstance(node, Call) else None
            if made is None:
                made = torch.narrow(as_promise(node), dim, start, length)
            self._made[key] = made.node  # type: ignore[attr-defined]
        return self._made[key]

    def _part(self, node: Node, dim: int, start: int, length: int) -> Promise:
        return as_promise(self.narrowed(node, dim, start, length))

    def _inside(self, node: Call, dim: int, start: int, length: int) -> torch.Tensor | None:
        func = node.func
        if func in _ELEMENTWISE and node.kwargs.get("alpha", 1) == 1:
            args = [self._operand(x, node, dim, start, length) for x in node.args]
            made: torch.Tensor = func(*args, **node.kwargs)
            return made
        if func in (aten.cat.default, aten.stack.default):
            return self._joined(node, dim, start, length)
        if not node.args or not isinstance(node.args[0], Node):
            return None
        source, rest = node.args[0], node.args[1:]
        if func in _VIEWS:
            return self._viewed(source, node, dim, start, length)
        n_dims = len(shape_of(source))
        inner = _dim_before(func, rest, n_dims, dim)
        if inner is None:
            return None
        if func is aten.expand.default:
            sizes = list(shape_of(node))
            sizes[dim] = length
            if inner < 0 or shape_of(source)[inner] == 1:
                return as_promise(source).expand(sizes)
            return self._part(source, inner, start, length).expand(sizes)
        moved: torch.Tensor = func(self._part(source, inner, start, length), *rest, **node.kwargs)
        return moved

    def _operand(self, x: Any, whole: Call, dim: int, start: int, length: int) -> Any:
        """The part of an operand that is broadcast to the result's shape."""
        if not isinstance(x, Node):
            return x
        own = dim - (len(shape_of(whole)) - len(shape_of(x)))
        if own < 0 or shape_of(x)[own] != shape_of(whole)[dim]:
            return as_promise(x)
        return self._part(x, own, start, length)

    def _joined(self, node: Call, dim: int, start: int, length: int) -> torch.Tensor | None:
        parts = node.args[0]
        at = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(
            shape_of(node)
        )
        if not all(isinstance(part, Node) for part in parts):
            return None
        if node.func is aten.stack.default:
            if at == dim:
                chosen = parts[start : start + length]
                return torch.stack([as_promise(part) for part in chosen], at)
            own = dim - (dim > at)
            return torch.stack([self._part(part, own, start, length) for part in parts], at)
        if any(len(shape_of(part)) != len(shape_of(node)) for part in parts):
            return None  # cat skips empty vectors
        if at != dim:
            return torch.cat([self._part(part, dim, start, length) for part in parts], at)
        found: list[torch.Tensor] = []
        position = 0
        for part in parts:
            size = shape_of(part)[dim]
            first, last = max(start, position), min(start + length, position + size)
            if first < last:
                found.append(self._part(part, dim, first - position, last - first))
            position += size
        return torch.cat(found, dim) if found else None

    def _viewed(
        self, source: Node, node: Call, dim: int, start: int, length: int
    ) -> torch.Tensor | None:
        shape, wanted = list(shape_of(source)), list(shape_of(node))
        if 0 in wanted:
            return None
        found = _leading(shape, wanted, dim)
        if found is None:
            return None
        own, inner, step = found
        if (start * inner) % step or (length * inner) % step:
            return None
        wanted[dim] = length
        part = self._part(source, own, start * inner // step, length * inner // step)
        return part.reshape(wanted)


def as_promise(node: Node) -> Promise:
    """The promise of a recipe."""
    like = meta_of(node)
    meta = torch.empty_strided(like.shape, like.stride(), dtype=dtype_of(node), device="meta")
    return Promise(node, meta, torch.device("cpu"))


def _dim_before(func: Any, rest: tuple[Any, ...], n_dims: int, dim: int) -> int | None:
    """Which dimension of its operand a dimension of a view is; None if it is no such view, or is
    none of them; below zero for one that `expand` adds.
    """
    if func is aten.permute.default:
        return int(rest[0][dim] % n_dims)
    if func is aten.transpose.int:
        one, other = rest[0] % n_dims, rest[1] % n_dims
        return int({one: other, other: one}.get(dim, dim))
    if func is aten.t.default:
        return n_dims - 1 - dim
    if func is aten.unsqueeze.default:
        new = rest[0] % (n_dims + 1)
        return None if dim == new else dim - (dim > new)
    if func is aten.expand.default:
        return dim - (len(rest[0]) - n_dims)
    if func is aten.select.int:
        return int(dim + (dim >= rest[0] % n_dims))
    if func is aten.slice.Tensor:
        sliced = (rest[0] if rest else 0) % n_dims
        return None if dim == sliced else dim
    return None


def _leading(shape: list[int], wanted: list[int], dim: int) -> tuple[int, int, int] | None:
    """Where a view's dimension leads its group of dimensions (those that are merged or split into
    one another): the operand's leading dimension, and how many elements of the group one step
    along either of them passes, the view's first.
    """
    i = j = 0
    while j < len(wanted):
        olds, news = [i], [j]
        size, made = (shape[i] if i < len(shape) else 1), wanted[j]
        while size != made:
            if size < made:
                olds.append(olds[-1] + 1)
                size *= shape[olds[-1]]
            else:
                news.append(news[-1] + 1)
                made *= wanted[news[-1]]
        if dim in news:
            long_news = [n for n in news if wanted[n] != 1]
            long_olds = [n for n in olds if n < len(shape) and shape[n] != 1]
            if not long_news or long_news[0] != dim or not long_olds:
                return None
            lead = long_olds[0]
            inner = prod(wanted[n] for n in news if n > dim)
            return lead, inner, prod(shape[n] for n in olds if n > lead)
        i, j = olds[-1] + 1, news[-1] + 1
    return None
