"""Pictures of loads, plans and models: public names. Needs matplotlib, the extra "plots"."""

from tl_fastload.report.pictures.loads import (
    Series,
    plot_load,
    plot_memory_map,
    plot_peaks,
    plot_plan,
    plot_timelines,
)

__all__ = ["Series", "plot_load", "plot_memory_map", "plot_peaks", "plot_plan", "plot_timelines"]
