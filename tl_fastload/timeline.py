"""A name in old pickles of whole models; use `tl_fastload.report.timeline`."""

from tl_fastload.report.timeline import Phase, Timeline

__all__ = ["Phase", "Timeline"]
