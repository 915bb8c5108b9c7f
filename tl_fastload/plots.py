"""Pictures of loads, plans and models: public names. Needs matplotlib, the extra "plots"."""

from pathlib import Path
from typing import Any

from tl_fastload.ground.boundary import spelt
from tl_fastload.report.pictures import layers
from tl_fastload.report.pictures.loads import Series, plot_load, plot_peaks, plot_timelines
from tl_fastload.report.pictures.plan import plot_plan
from tl_fastload.roads.known import road_of

__all__ = ["Series", "plot_load", "plot_memory_map", "plot_peaks", "plot_plan", "plot_timelines"]


@spelt
def plot_memory_map(model: Any, path: str | Path | None = None) -> Any:
    """Draw where the memory of a loaded model lies, layer by layer: mapped, quantized or dense.

    In each bar attention lies at the bottom, the MLP above it, norms and buffers on top.

    Args:
        model: a `HookedTransformer`.
        path: a file to write as well.
    """
    return layers.plot_memory_map(model, road_of(model).role, path)
