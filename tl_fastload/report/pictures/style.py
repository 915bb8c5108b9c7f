"""What every picture shares: colours, style, size, units.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which colour-blind readers
can tell apart; line styles and hatches carry the same message in grey. Figures are made without
pyplot, so that drawing needs no display and leaves no state behind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from tl_fastload.errors import MissingPackageError

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, YELLOW, BLACK = "#56B4E9", "#CC79A7", "#F0E442", "#000000"
_SIZE_INCHES = (8.0, 5.0)
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))

Style = tuple[str, str]
"""The fill of an area and its hatch."""
OTHER: Style = ("#DDDDDD", "")

Draw = TypeVar("Draw", bound=Callable[..., Any])


def styled(draw: Draw) -> Draw:
    """Draw in our own style, whatever the user's settings are."""

    @functools.wraps(draw)
    def in_style(*args: Any, **kwargs: Any) -> Any:
        with pictures().style():
            return draw(*args, **kwargs)

    return cast(Draw, in_style)


def unit(size_bytes: float) -> tuple[int, str]:
    """The unit to show sizes up to this one in: its bytes and its name."""
    return next(((size, name) for size, name in _UNITS if size_bytes >= size), (1, "bytes"))


def pictures() -> Any:
    """The module that imports matplotlib."""
    try:
        from tl_fastload.report.pictures import canvas as picture
    except ImportError as error:
        raise MissingPackageError(
            "Pictures need matplotlib, which is not installed or does not work here "
            f'({error}): pip install "tl-fastload[plots]".'
        ) from error
    return picture


def figure_of(height_inches: float = _SIZE_INCHES[1]) -> Any:
    """An empty figure, as wide as a notebook's column."""
    return pictures().Picture(_SIZE_INCHES[0], height_inches)


def finish(figure: Any, path: str | Path | None) -> Any:
    """Write the figure if there is where to, and return it."""
    if path is not None:
        figure.write(path)
    return figure


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
    fill, hatch = style
    draw(at, size, color=fill, hatch=hatch, edgecolor=BLACK, linewidth=0.7, label=label, **place)


def legend(figure: Any, styles: Mapping[str, Style] | None = None) -> None:
    """The legend below a picture: of what has a label, or of these styles."""
    handles = [
        pictures().Patch(facecolor=fill, hatch=hatch, edgecolor=BLACK, linewidth=0.7, label=name)
        for name, (fill, hatch) in (styles or {}).items()
    ]
    given = {"handles": handles} if styles else {}
    figure.legend(**given, loc="outside lower center", ncols=3, frameon=False)


def draw_peak(axes: Any, row: int, held: float, resident: float) -> None:
    """One horizontal bar: memory that no file backs, and file pages on top of it."""
    labels = ("memory that no file backs", "file pages on top") if row == 0 else (None, None)
    bar(axes, row, held, 0.0, (BLUE, ""), labels[0])
    bar(axes, row, max(resident - held, 0), held, ("#FFFFFF", "////"), labels[1])


def label_rows(axes: Any, labels: Sequence[str]) -> None:
    """Name the rows of horizontal bars, the first one on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def draw_mark(axes: Any, row: int, at: float, color: str, label: str | None) -> None:
    """A thick tick across a bar."""
    axes.plot(
        [at, at],
        [row - 0.42, row + 0.42],
        color=color,
        linewidth=4,
        solid_capstyle="butt",
        label=label,
    )


def write_beside(axes: Any, row: int, at: float, text: str) -> None:
    """Text to the right of a bar's end."""
    axes.annotate(text, (at, row), xytext=(7, 0), textcoords="offset points", va="center")
