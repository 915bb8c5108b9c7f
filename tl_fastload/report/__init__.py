"""What is measured and told: memory, progress, reports.

Must not know how anything is loaded.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "LoadReport":  # pickles of whole models from before there were rooms say so
        from tl_fastload.report.load_report import LoadReport

        return LoadReport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
