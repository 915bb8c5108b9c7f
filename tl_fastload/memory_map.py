"""Where a model's memory lies, layer by layer: public names."""

from tl_fastload.report.memory_map import STATES, memory_map

__all__ = ["STATES", "memory_map"]
