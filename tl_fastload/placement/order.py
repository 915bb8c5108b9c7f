"""In which order parameters are placed, and which of them together."""

from __future__ import annotations

from bisect import bisect_left

from tl_fastload.ground.own_defaults import looking_only
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.recipes.evaluate import sources
from tl_fastload.recipes.nodes import SourceView
from tl_fastload.recipes.promise import Promise


@looking_only
def groups(recipes: dict[str, Promise]) -> list[list[str]]:
    """The order of placement: groups of names that are evaluated together.

    Largest parameter first, and of equal ones the largest group (a fused matrix makes three of
    them), so that scratch memory falls when little has been allocated. Small parameters that read
    the same weight (a folded bias) are evaluated just before it, so that the weight is read once.
    """
    size = {name: bytes_of(promise) for name, promise in recipes.items()}
    views = {name: sources(promise.node) for name, promise in recipes.items()}
    large = {name: _large(found) for name, found in views.items()}
    names = sorted(recipes, key=lambda name: -size[name])
    big = {source: name for name in reversed(names) for source in large[name]}
    joined: dict[str, list[str]] = {}
    rank: dict[str, int] = {}  # of the groups' first names
    for name in names:
        heads = {big[source] for source in large[name]} & rank.keys()
        head = min(heads, key=rank.__getitem__, default=name)
        rank.setdefault(head, len(rank))
        joined.setdefault(head, []).append(name)

    def largest_first(group: list[str]) -> tuple[int, int]:
        return -size[group[0]], -sum(size[name] for name in group)

    ordered = sorted(joined.values(), key=largest_first)
    return [_small_before_big(group, recipes, views) for group in ordered]


def _small_before_big(
    group: list[str], recipes: dict[str, Promise], views: dict[str, list[SourceView]]
) -> list[str]:
    if len(group) == 1:
        return group
    reads = {name: set(views[name]) for name in group}
    size = {name: recipes[name].numel() for name in group}
    readers: dict[SourceView, list[str]] = {}
    for name in sorted(group, key=size.__getitem__):
        for view in reads[name]:
            readers.setdefault(view, []).append(name)
    rank = {name: -position for position, name in enumerate(group)}
    order: dict[str, None] = {}
    for name in group:
        if name not in order:
            small: set[str] = set()
            for view in reads[name]:
                count = bisect_left(readers[view], size[name] / 8, key=size.__getitem__)
                small.update(readers[view][:count])
            order.update(dict.fromkeys(sorted(small, key=rank.__getitem__)))
            order[name] = None
    return list(order)


def _large(views: list[SourceView]) -> tuple[int, ...]:
    """The `id`s of the sources of some views that are large among them."""
    sizes = [view.source.shape.numel() for view in views]
    largest = max(sizes, default=0)
    return tuple(
        id(view.source) for view, size in zip(views, sizes, strict=True) if size * 8 > largest
    )
