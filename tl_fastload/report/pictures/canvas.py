"""A matplotlib figure that needs no display: the package's only import of matplotlib."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tl_fastload.errors import ArgumentError
from tl_fastload.ground.paths import write_whole

__all__ = ["Patch", "Picture", "check_format", "style"]

_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "legend.fontsize": 10,
    "hatch.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def style() -> Any:
    """A context in which pictures are drawn, whatever the user's own settings are."""
    settings: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_STYLE}
    settings.pop("backend")  # naming one would load it
    return matplotlib.rc_context(settings)


def check_format(path: Path) -> str:
    """The format that the ending of a name says.

    Raises:
        ArgumentError: matplotlib has none of that name.
    """
    known = FigureCanvasAgg.get_supported_filetypes()
    kind = path.suffix[1:].lower()
    if kind not in known:
        raise ArgumentError(
            f"{path}: pictures are written as {', '.join(sorted(known))}; end the name in one of "
            "these, such as .png."
        )
    return kind


class Picture(Figure):
    """A figure that notebooks show, made and drawn without pyplot.

    Args:
        width_inches: at 100 dots per inch.
        height_inches: likewise.
    """

    def __init__(self, width_inches: float, height_inches: float) -> None:
        super().__init__(figsize=(width_inches, height_inches), dpi=100, layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        with style():
            self.savefig(stream, format="png")
        return stream.getvalue()

    def write(self, path: str | Path) -> None:
        """Write the picture, whole or not at all; the ending of the name says the format.

        Raises:
            ArgumentError: a format that matplotlib does not have, or a folder that is not there.
        """
        path = Path(path)
        kind = check_format(path)
        with style():
            write_whole(path, lambda file: self.savefig(file, format=kind))
