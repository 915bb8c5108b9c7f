"""Pictures of loads, plans and models: public names. Needs matplotlib, the extra "plots"."""

from tl_fastload.report.pictures.layers import plot_memory_map
from tl_fastload.report.pictures.loads import Series, plot_load, plot_peaks, plot_timelines
from tl_fastload.report.pictures.plan import plot_plan

__all__ = ["Series", "plot_load", "plot_memory_map", "plot_peaks", "plot_plan", "plot_timelines"]
