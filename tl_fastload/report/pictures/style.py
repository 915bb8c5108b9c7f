"""What every picture shares: colours, style, size, units, bars, legends.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which colour-blind readers
can tell apart; line styles and hatches carry the same message in grey. Figures are made without
pyplot, so that drawing needs no display and leaves no state behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tl_fastload.errors import MissingPackageError

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, YELLOW, BLACK = "#56B4E9", "#CC79A7", "#F0E442", "#000000"
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))

Style = tuple[str, str]
"""The fill of an area and its hatch."""
OTHER: Style = ("#DDDDDD", "")
_EDGE = {"edgecolor": BLACK, "linewidth": 0.7}


def pictures() -> Any:
    """The module that imports matplotlib."""
    try:
        from tl_fastload.report.pictures import canvas
    except ImportError as error:
        raise MissingPackageError(
            "Pictures need matplotlib, which is not installed or does not work here "
            f'({error}): pip install "matplotlib>=3.7".'
        ) from error
    return canvas


@contextmanager
def picture(path: str | Path | None, height_inches: float = 5.0) -> Iterator[Any]:
    """An empty figure, as wide as a notebook's column, to be drawn into in our own style, whatever
    the user's settings are; then it is written, if there is where to.
    """
    with pictures().style():
        figure = pictures().Picture(8.0, height_inches)
        yield figure
        if path is not None:
            figure.write(path)


def unit(size_bytes: float) -> tuple[int, str]:
    """The unit to show sizes up to this one in: its bytes and its name."""
    return next(((size, name) for size, name in _UNITS if size_bytes >= size), (1, "bytes"))


def bar(
    axes: Any,
    at: float,
    size: float,
    before: float = 0.0,
    style: Style = OTHER,
    label: str | None = None,
    *,
    thick: float = 0.6,
    upright: bool = False,
) -> None:
    """A filled piece of a bar: from `before` on, `size` long, across at `at`."""
    draw = axes.bar if upright else axes.barh
    place = {"bottom": before, "width": thick} if upright else {"left": before, "height": thick}
    draw(at, size, color=style[0], hatch=style[1], label=label, **_EDGE, **place)


def legend(figure: Any, styles: Mapping[str, Style] | None = None) -> None:
    """The legend below a picture: of what has a label, or of these styles."""
    handles = [
        pictures().Patch(facecolor=fill, hatch=hatch, label=name, **_EDGE)
        for name, (fill, hatch) in (styles or {}).items()
    ]
    given = {"handles": handles} if styles else {}
    figure.legend(**given, loc="outside lower center", ncols=3, frameon=False)


class Peak(NamedTuple):
    """One row of horizontal bars; sizes in the unit of the axis.

    Attributes:
        label: of the row.
        held: anonymous memory.
        resident: all memory that is resident.
        mark: where a tick crosses the bar, or None.
        text: stands to the right of the bar.
        text_at: where that begins.
    """

    label: str
    held: float
    resident: float
    mark: float | None
    text: str
    text_at: float


def draw_peaks(axes: Any, peaks: Sequence[Peak], mark_color: str, mark_label: str) -> None:
    """A bar for each peak, the first one on top: anonymous memory, and file pages after it."""
    for row, peak in enumerate(peaks):
        texts = ["anonymous memory", "pages of mapped files", mark_label]
        held, pages, mark = texts if row == 0 else [None] * 3
        bar(axes, row, peak.held, 0.0, (BLUE, ""), held)
        bar(axes, row, max(peak.resident - peak.held, 0), peak.held, ("#FFFFFF", "////"), pages)
        if peak.mark is not None:
            at = [peak.mark] * 2
            look = {"color": mark_color, "linewidth": 4, "solid_capstyle": "butt", "label": mark}
            axes.plot(at, [row - 0.42, row + 0.42], **look)
        write_beside(axes, row, peak.text_at, peak.text)
    label_rows(axes, [peak.label for peak in peaks])


def label_rows(axes: Any, labels: Sequence[str]) -> None:
    """Name the rows of horizontal bars, the first one on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def write_beside(axes: Any, row: int, at: float, text: str) -> None:
    """Text to the right of a bar's end."""
    axes.annotate(text, (at, row), xytext=(7, 0), textcoords="offset points", va="center")
