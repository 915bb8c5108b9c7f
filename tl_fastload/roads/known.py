"""Which road a model is on, by the class of TransformerLens' that it is of."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tl_fastload.roads.road import Road

# By name: none of them is imported, nor TransformerLens, before somebody has such a model.
_HOMES = {
    "HookedTransformer": "tl_fastload.hooked.road",
    "TransformerBridge": "tl_fastload.bridge.road",
}


def road_of(model: Any) -> Road | None:
    """The road of a model, loaded by tl_fastload or not; None if it is of no class that has one."""
    for cls in type(model).__mro__:
        library = cls.__module__.partition(".")[0]
        if library == "transformer_lens" and cls.__name__ in _HOMES:
            road: Road = import_module(_HOMES[cls.__name__]).ROAD
            return road
    return None
