"""Which road a model is on, by the class of TransformerLens' that it is of."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tl_fastload.errors import ArgumentError, LeanLoadError
from tl_fastload.request.steps import STEPS
from tl_fastload.roads.road import Road

# By name: none of them is imported, nor TransformerLens, before somebody has such a model.
_HOMES = {
    "HookedTransformer": "tl_fastload.hooked.road",
    "TransformerBridge": "tl_fastload.bridge.road",
}
# What stands for a model until it is filled.
_STANDING_IN = {"Shelf": "tl_fastload.bridge.road"}


def road_of(model: Any, error: type[LeanLoadError] = ArgumentError) -> Road:
    """The road of a model, loaded by tl_fastload or not.

    Args:
        model: any module, or what a road fills in place of one.
        error: what is raised if it is of no class that has one.
    """
    found = find_road(model)
    if found is None:
        kinds = " or ".join(f"a {name}" for name in _HOMES)
        raise error(f"tl_fastload works with {kinds}, not with a {type(model).__name__}.")
    return found


def find_road(model: Any) -> Road | None:
    """The road of a model; None if it is of no class that has one."""
    for cls in type(model).__mro__:
        library = cls.__module__.partition(".")[0]
        known = {"transformer_lens": _HOMES, "tl_fastload": _STANDING_IN}.get(library, {})
        if cls.__name__ in known:
            road: Road = import_module(known[cls.__name__]).ROAD
            return road
    return None


def describe_steps(model: Any, requested: Mapping[str, bool]) -> dict[str, str]:
    """What becomes of each processing step, for the report."""
    road, outcome = road_of(model), {}
    for step in STEPS:
        reason = road.why_skipped(step, model.cfg)
        outcome[step] = "done" if reason is None else f"skipped: {reason}"
        if not requested.get(step, False):
            outcome[step] = "skipped: not asked for"
    return outcome
