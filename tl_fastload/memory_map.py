"""Where a model's memory lies, layer by layer: public names."""

from typing import Any

from tl_fastload.errors import ArgumentError
from tl_fastload.ground.role import RoleOf
from tl_fastload.hooked import names
from tl_fastload.report import memory_map as maps
from tl_fastload.report.memory_map import STATES, Part
from tl_fastload.roads.known import road_of

__all__ = ["STATES", "memory_map"]


def memory_map(model: Any) -> list[Part]:
    """Where the memory of a model's parameters and buffers lies, in the order of the layers.

    Mapped memory is told by the system's own table (`/proc/self/maps`); where there is none (other
    systems than Linux), it counts as dense.

    Args:
        model: a `HookedTransformer`.

    Raises:
        HalfWrittenError: a step in place was interrupted in it.
    """
    return maps.memory_map(model, role_in(model))


def role_in(model: Any) -> RoleOf:
    """What each parameter of a model is; those of classes without a road may have the names that
    TransformerLens gives to most.
    """
    try:
        return road_of(model).role
    except ArgumentError:
        return names.role
