"""Where a model's memory lies, layer by layer: public names."""

from typing import Any

from tl_fastload.report import memory_map as maps
from tl_fastload.report.memory_map import STATES, Part
from tl_fastload.roads.known import road_of

__all__ = ["STATES", "memory_map"]


def memory_map(model: Any) -> list[Part]:
    """Where the memory of a model's parameters and buffers lies, in the order of the layers.

    Mapped memory is told by the system's own table (`/proc/self/maps`); where there is none (other
    systems than Linux), it counts as dense.

    Args:
        model: a HookedTransformer or a TransformerBridge.

    Raises:
        ArgumentError: a model of another class.
        HalfWrittenError: a step in place was interrupted in it.
    """
    return maps.memory_map(model, road_of(model).role)
