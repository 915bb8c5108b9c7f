"""Pictures of loads: memory over time, and peaks as bars. Needs matplotlib, the extra "plots"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tl_fastload.errors import ArgumentError
from tl_fastload.ground.words import format_bytes
from tl_fastload.report.pictures.plan import plot_plan
from tl_fastload.report.pictures.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    OTHER,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    bar,
    draw_mark,
    draw_peak,
    figure_of,
    finish,
    label_rows,
    legend,
    pictures,
    styled,
    unit,
    write_beside,
)
from tl_fastload.report.timeline import Phase, Timeline

__all__ = ["Series", "plot_load", "plot_peaks", "plot_plan", "plot_timelines"]

_LINES = (
    {"color": BLUE, "linestyle": "-"},
    {"color": VERMILION, "linestyle": (0, (6, 2))},
    {"color": GREEN, "linestyle": (0, (4, 2, 1, 2))},
    {"color": PURPLE, "linestyle": (0, (1, 1.2))},
)
_PHASES = {
    "configuration": ("#FFFFFF", "...."),
    "recording": (YELLOW, ""),
    "placing": (SKY, "////"),
    "transformers loads": (PURPLE, "\\\\\\\\"),
    "conversion": (BLACK, ""),
    "processing": (ORANGE, "xxxx"),
}


@dataclass(frozen=True)
class Series:
    """A load to draw: its name, its memory over time, and the bytes of the parameters it made."""

    label: str
    timeline: Timeline
    final_bytes: int


class Loaded(Protocol):
    """What a picture needs of a load: a `LoadReport` has it."""

    @property
    def source(self) -> str: ...
    @property
    def parameter_bytes(self) -> int: ...
    @property
    def timeline(self) -> Timeline: ...


class Measured(Protocol):
    """What a bar needs of a measured load: a `Measurement` of the command line has it."""

    @property
    def name(self) -> str: ...
    @property
    def error(self) -> str | None: ...
    @property
    def peak_anonymous_bytes(self) -> int: ...
    @property
    def peak_resident_bytes(self) -> int: ...
    @property
    def parameter_bytes(self) -> int: ...
    @property
    def median_seconds(self) -> float: ...


def plot_load(report: Loaded, stock: Any = None, path: str | Path | None = None) -> Any:
    """Draw the memory of a lean load over its time, and of a stock load beside it.

    Args:
        report: of the lean load.
        stock: what `tl_fastload.watch_memory()` gave, a `Timeline`, or None.
        path: a file to write as well.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ArgumentError: the report has no timeline, or `stock` is something else.
        MissingPackageError: matplotlib is not installed.
    """
    series = [Series("lean", report.timeline, report.parameter_bytes)]
    if stock is not None:
        timeline = stock.timeline() if hasattr(stock, "timeline") else stock
        if not isinstance(timeline, Timeline):
            raise ArgumentError(
                f"stock= is a {type(stock).__name__}: pass what `with tl_fastload.watch_memory() "
                "as stock:` gives around a stock load."
            )
        series.append(Series("stock", timeline, report.parameter_bytes))
    return plot_timelines(series, f"Memory while loading {_short(report.source)}", path)


@styled
def plot_timelines(series: Sequence[Series], title: str, path: str | Path | None = None) -> Any:
    """Draw the memory of several loads over the same axes: phases below, final sizes as lines.

    Args:
        series: the loads, the first one in front.
        title: of the picture.
        path: a file to write as well.
    """
    for one in series:
        if not one.timeline.seconds:
            raise ArgumentError(f"There is no memory over time to draw of {one.label}.")
    figure = figure_of()
    upper, lower = figure.subplots(
        2, 1, sharex=True, height_ratios=(5, 0.35 + 0.3 * len(series)), gridspec_kw={"hspace": 0.06}
    )
    device = any(any(one.timeline.device_bytes) for one in series)
    highest = max(max(_curve(one.timeline, device)) for one in series)
    files = not device and any(_has_file_pages(one) for one in series)
    if files:
        highest = max(highest, *(max(one.timeline.resident_bytes) for one in series))
    finals = sorted({one.final_bytes for one in series})
    unit_bytes, unit_name = unit(max(highest, *finals))
    for number, one in reversed(list(enumerate(series))):
        _draw_curve(upper, one, _LINES[number % len(_LINES)], unit_bytes, device, number == 0)
    _draw_finals(upper, finals, unit_bytes)
    upper.set_ylim(0, 1.16 * max(highest, *finals) / unit_bytes)
    upper.set_xlim(0, 1.01 * max(one.timeline.seconds[-1] for one in series))
    upper.set_ylabel(f"{'device' if device else 'host'} memory above the start ({unit_name})")
    upper.set_title(title)
    handles, labels = upper.get_legend_handles_labels()
    if files:
        handles.append(_file_pages_handle())
        labels.append("with file pages")
    upper.legend(handles, labels, loc="best", framealpha=0.95)
    _draw_phases(lower, series)
    return finish(figure, path)


def _curve(timeline: Timeline, device: bool) -> tuple[int, ...]:
    if not device:
        return timeline.anonymous_bytes
    return timeline.device_bytes or (0,) * len(timeline.seconds)


def _has_file_pages(one: Series) -> bool:
    """Whether the pages of files that were resident would show."""
    more = max(one.timeline.resident_bytes) - max(one.timeline.anonymous_bytes)
    return more > 0.03 * max(one.final_bytes, *one.timeline.anonymous_bytes)


def _draw_curve(
    axes: Any, one: Series, style: dict[str, Any], unit_bytes: int, device: bool, filled: bool
) -> None:
    timeline = one.timeline
    curve = _curve(timeline, device)
    sizes = [size / unit_bytes for size in curve]
    peak = max(curve)
    label = f"{one.label}: peak {format_bytes(peak)} ({peak / max(one.final_bytes, 1):.2f}x)"
    axes.plot(timeline.seconds, sizes, label=label, linewidth=2.2, **style)
    if filled:
        axes.fill_between(timeline.seconds, sizes, color=style["color"], alpha=0.15, linewidth=0)
    if not device and _has_file_pages(one):
        resident = [size / unit_bytes for size in timeline.resident_bytes]
        axes.plot(timeline.seconds, resident, color=style["color"], linewidth=1.1, linestyle=":")
    at = max(range(len(curve)), key=curve.__getitem__)
    axes.plot(timeline.seconds[at], sizes[at], "o", color=style["color"], markersize=6)


def _file_pages_handle() -> Any:
    return pictures().Line2D([], [], color=BLACK, linewidth=1.1, linestyle=":")


def _draw_finals(axes: Any, finals: Sequence[int], unit_bytes: int) -> None:
    for number, size_bytes in enumerate(finals):
        label = f"parameters: {format_bytes(size_bytes)}"
        style = ("-.", (0, (8, 3)))[number % 2]
        axes.axhline(
            size_bytes / unit_bytes, color=BLACK, linewidth=1.2, linestyle=style, label=label
        )


def _draw_phases(axes: Any, series: Sequence[Series]) -> None:
    """A strip for each load, in which its phases follow each other."""
    names: list[str] = []
    for row, one in enumerate(series):
        phases = one.timeline.phases or (Phase("loading", 0.0),)
        ends = [phase.start_seconds for phase in phases[1:]] + [one.timeline.seconds[-1]]
        for phase, end in zip(phases, ends, strict=True):
            length = end - phase.start_seconds
            style = _PHASES.get(phase.name, OTHER)
            bar(axes, row, length, phase.start_seconds, style, thick=0.72)
            if phase.name not in names:
                names.append(phase.name)
    label_rows(axes, [one.label for one in series])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds")
    legend(axes.figure, {name: _PHASES.get(name, OTHER) for name in names})


@styled
def plot_peaks(measurements: Sequence[Measured], title: str, path: str | Path | None = None) -> Any:
    """Draw the peak memory of measured loads as bars, with the size of the parameters in each.

    Args:
        measurements: of loads; those with an error are left out.
        title: of the picture.
        path: a file to write as well.
    """
    good = [found for found in measurements if found.error is None]
    if not good:
        raise ArgumentError("There is nothing to draw: no load could be measured.")
    figure = figure_of(2.1 + 0.58 * len(good))
    axes = figure.subplots()
    largest = max(max(m.peak_resident_bytes, m.parameter_bytes) for m in good)
    unit_bytes, unit_name = unit(largest)
    for row, found in enumerate(good):
        _draw_peak(axes, row, found, unit_bytes)
    label_rows(axes, [found.name for found in good])
    axes.set_xlim(0, 1.25 * largest / unit_bytes)
    axes.set_xlabel(
        f"peak memory above the start of the load ({unit_name}); beside it, the part of it\n"
        "that no file backs as a multiple of the parameters, and the time"
    )
    axes.set_title(title)
    legend(figure)
    return finish(figure, path)


def _draw_peak(axes: Any, row: int, found: Measured, unit_bytes: int) -> None:
    anonymous = found.peak_anonymous_bytes / unit_bytes
    resident = max(found.peak_resident_bytes, found.peak_anonymous_bytes) / unit_bytes
    final = found.parameter_bytes / unit_bytes
    draw_peak(axes, row, anonymous, resident)
    draw_mark(axes, row, final, ORANGE, "size of the parameters" if row == 0 else None)
    ratio = found.peak_anonymous_bytes / max(found.parameter_bytes, 1)
    text = f"{ratio:.2f}x, {found.median_seconds:.2f} s"
    write_beside(axes, row, max(resident, final), text)


def _short(source: str) -> str:
    """The last part of a folder's path; a hub name as it is."""
    return Path(source).name if Path(source).is_absolute() else source
