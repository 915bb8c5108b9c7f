"""Which part of each parameter a process holds, and who evaluates it.

A recipe is cut where that reads no more than evaluating it once would: each process then reads and
computes its own part. Where it cannot be cut (sums over a large weight), one process evaluates it
whole and sends the others their parts, so that all together still read the file once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from tl_fastload.ground.compat import item_bytes
from tl_fastload.ground.geometry import is_dense, span
from tl_fastload.placement.order import groups
from tl_fastload.recipes.evaluate import operands, sources
from tl_fastload.recipes.nodes import Call, Node, Pick, Source, SourceView
from tl_fastload.recipes.promise import Promise
from tl_fastload.recipes.slices import Slices
from tl_fastload.source.held import HeldSource
from tl_fastload.source.reader import DENSE_PIECE_BYTES, FileSource

_FREE_BYTES = 16 << 10  # may be read again by each process: asking for them takes as long
_MORE = 1.05
_ROWS_A_RANK = 8  # of a first dimension that need not be even


@dataclass(frozen=True)
class Part:
    """What of a parameter one process holds.

    Attributes:
        dim: the dimension that is cut; None for a parameter that every process has whole.
        sizes: how long each process's part of it is; empty for None.
    """

    dim: int | None = None
    sizes: tuple[int, ...] = ()

    def shape(self, whole: torch.Size, rank: int) -> torch.Size:
        """The shape of a process's part."""
        if self.dim is None:
            return whole
        return torch.Size([*whole[: self.dim], self.sizes[rank], *whole[self.dim + 1 :]])

    def of(self, slices: Slices, node: Node, rank: int) -> Node:
        """A process's part of a recipe."""
        if self.dim is None:
            return node
        return slices.narrowed(node, self.dim, sum(self.sizes[:rank]), self.sizes[rank])


@dataclass
class ShardPlan:
    """Who holds and evaluates what.

    Attributes:
        parts: parameter -> its part.
        cut: groups of names whose parts each process evaluates itself.
        whole: groups of names that one process evaluates: the first those of process 0, the second
            those of process 1, and so on around.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    cut: list[list[str]] = field(default_factory=list)
    whole: list[list[str]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.parts} {self.cut} {self.whole}"


Choose = Callable[[str, torch.Size], "list[int] | None"]
"""Name and shape of a parameter -> the dimensions that may be cut, the first the dearest; None for
a parameter that every process has whole."""


def even_or_long(n_ranks: int, name: str, shape: torch.Size) -> list[int] | None:
    """The dimensions that FSDP2 can cut into parts of about one size; None for a single number."""
    if not shape:
        return None
    even = [dim for dim, size in enumerate(shape) if size and size % n_ranks == 0]
    if 0 not in even and shape[0] >= _ROWS_A_RANK * n_ranks:
        even = [0, *even]
    return even or [0]


def make_plan(
    recipes: Mapping[str, Promise], choose: Choose, n_ranks: int, buffers: Collection[str] = ()
) -> ShardPlan:
    """Decide about every recipe; all processes decide alike.

    Args:
        recipes: of parameters and buffers.
        choose: which dimensions of a parameter may be cut.
        n_ranks: how many processes there are.
        buffers: which of them every process has whole, and no parameters are.
    """
    plan, slices = ShardPlan(), Slices()
    for name, promise in recipes.items():
        dims = None if name in buffers else choose(name, promise.shape)
        if dims is None:
            plan.parts[name] = Part()
        else:
            plan.parts[name] = _cheapest(promise, dims, n_ranks, slices)
    for group in groups(dict(recipes)):
        nodes = [recipes[name].node for name in group]
        parts = [plan.parts[name].of(slices, recipes[name].node, 0) for name in group]
        once, each = _bytes_read(nodes), _bytes_read(parts)
        is_whole = all(plan.parts[n].dim is None and n not in buffers for n in group)
        if is_whole or n_ranks * each <= max(_MORE * once, once + _FREE_BYTES):
            plan.cut.append(group)
        else:
            plan.whole.append(group)
    return plan


def _cheapest(promise: Promise, dims: list[int], n_ranks: int, slices: Slices) -> Part:
    parts = [Part(dim, chunk_sizes(promise.shape[dim], n_ranks)) for dim in dims]
    if len(parts) == 1:
        return parts[0]
    costs = [_bytes_read([part.of(slices, promise.node, 0)]) for part in parts]
    return next(part for part, cost in zip(parts, costs, strict=True) if cost <= _MORE * min(costs))


def chunk_sizes(size: int, n_ranks: int) -> tuple[int, ...]:
    """How long the parts are that `torch.chunk` makes, as FSDP2 and DTensor cut; some are empty
    where there are more processes than rows.
    """
    step = -(-size // n_ranks)
    return tuple(max(0, min(step, size - number * step)) for number in range(n_ranks))


def hold_shared(nodes: list[Node]) -> list[Node]:
    """The same recipes, with each stored tensor that they would read several times over (a fused
    matrix) read once and held.
    """
    read = _views_by_source(nodes)
    held: dict[Source, HeldSource] = {
        source: HeldSource(source, [view.geometry for view in views])
        for source, views in read.items()
        if isinstance(source, FileSource) and _hull(views) < 0.95 * _apart(views)
    }
    if not held:
        return nodes
    replaced: dict[Node, Node] = {}
    return [_replace(node, held, replaced) for node in nodes]


def _replace(node: Node, held: Mapping[Source, HeldSource], done: dict[Node, Node]) -> Node:
    if node in done:
        return done[node]
    made = node
    if isinstance(node, SourceView) and node.source in held:
        made = SourceView(held[node.source], node.geometry, node.casts)
    elif isinstance(node, Pick):
        call = _replace(node.call, held, done)
        made = Pick(call, node.index)  # type: ignore[arg-type]
    elif isinstance(node, Call):
        new = {operand: _replace(operand, held, done) for operand in operands(node)}
        if any(old is not other for old, other in new.items()):
            args = tuple(_with(x, new) for x in node.args)
            kwargs = {key: _with(x, new) for key, x in node.kwargs.items()}
            made = Call(node.func, args, kwargs, node.meta)
    done[node] = made
    return made


def _with(x: object, new: Mapping[Node, Node]) -> object:
    if isinstance(x, Node):
        return new[x]
    if isinstance(x, (tuple, list)):
        return type(x)(_with(one, new) for one in x)
    return x


def _bytes_read(nodes: list[Node]) -> int:
    """Bytes of files that evaluating recipes together takes."""
    return sum(min(_apart(views), _hull(views)) for views in _views_by_source(nodes).values())


def _views_by_source(nodes: list[Node]) -> dict[Source, list[SourceView]]:
    found: dict[Source, list[SourceView]] = {}
    for view in {view: None for node in nodes for view in sources(node)}:
        if not isinstance(view.source, HeldSource) and hasattr(view.source, "entry"):
            found.setdefault(view.source, []).append(view)
    return found


def _hull(views: list[SourceView]) -> int:
    first = min(int(view.geometry.storage_offset()) for view in views)
    stop = max(int(view.geometry.storage_offset()) + span(view.geometry) for view in views)
    return (stop - first) * item_bytes(views[0].source.dtype)


def _apart(views: list[SourceView]) -> int:
    return sum(_one_view(view.geometry, item_bytes(view.source.dtype)) for view in views)


def _one_view(geometry: torch.Tensor, size: int) -> int:
    """As the reader does it: all between the first and the last element, or long pieces alone."""
    if is_dense(geometry) or geometry.numel() == 0:
        return geometry.numel() * size
    long = [dim for dim in range(geometry.dim()) if geometry.shape[dim] > 1]
    slowest = max(long, key=geometry.stride)
    piece = geometry.select(slowest, 0)
    if is_dense(piece) and piece.numel() * size >= DENSE_PIECE_BYTES:
        return geometry.numel() * size
    return span(geometry) * size
