"""Pictures of loads: memory over time, and peaks as bars. Needs matplotlib, the extra "plots"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_fastload.errors import ArgumentError
from tl_fastload.ground.words import format_bytes
from tl_fastload.report.pictures import style
from tl_fastload.report.timeline import Phase, Timeline

_LINES = (
    {"color": style.BLUE, "linestyle": "-"},
    {"color": style.VERMILION, "linestyle": (0, (6, 2))},
    {"color": style.GREEN, "linestyle": (0, (4, 2, 1, 2))},
    {"color": style.PURPLE, "linestyle": (0, (1, 1.2))},
)
_PHASES = {
    "configuration": ("#FFFFFF", "...."),
    "recording": (style.YELLOW, ""),
    "placing": (style.SKY, "////"),
    "transformers loads": (style.PURPLE, "\\\\\\\\"),
    "conversion": (style.BLACK, ""),
    "processing": (style.ORANGE, "xxxx"),
}
_FILE_PAGES = {"linewidth": 1.1, "linestyle": ":"}


@dataclass(frozen=True)
class Series:
    """A load to draw: its name, its memory over time, and the bytes of the parameters it made."""

    label: str
    timeline: Timeline
    final_bytes: int


def plot_load(report: Any, stock: Any = None, path: str | Path | None = None) -> Any:
    """Draw the memory of a lean load over its time, and of a stock load beside it.

    Args:
        report: the `LoadReport` of the lean load.
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
    device = any(any(one.timeline.device_bytes) for one in series)
    files = not device and any(_has_file_pages(one) for one in series)
    finals = sorted({one.final_bytes for one in series})
    curves = [_curve(one.timeline, device) for one in series]
    curves += [one.timeline.resident_bytes for one in series] if files else []
    highest = max(*finals, *(max(curve) for curve in curves))
    unit_bytes, unit_name = style.unit(highest)
    with style.picture(path) as figure:
        strips = 0.35 + 0.3 * len(series)
        upper, lower = figure.subplots(
            2, 1, sharex=True, height_ratios=(5, strips), gridspec_kw={"hspace": 0.06}
        )
        for number, one in reversed(list(enumerate(series))):
            _draw_curve(upper, one, _LINES[number % len(_LINES)], unit_bytes, device)
        front = [size / unit_bytes for size in curves[0]]
        fill = {"color": _LINES[0]["color"], "alpha": 0.15, "linewidth": 0}
        upper.fill_between(series[0].timeline.seconds, front, **fill)
        for number, size_bytes in enumerate(finals):
            look = {"color": style.BLACK, "linewidth": 1.2}
            look["linestyle"] = ("-.", (0, (8, 3)))[number % 2]
            label = f"parameters: {format_bytes(size_bytes)}"
            upper.axhline(size_bytes / unit_bytes, label=label, **look)
        if files:
            upper.plot([], [], color=style.BLACK, label="with file pages", **_FILE_PAGES)
        upper.set_ylim(0, 1.16 * highest / unit_bytes)
        upper.set_xlim(0, 1.01 * max(one.timeline.seconds[-1] for one in series))
        upper.set_ylabel(f"{'device' if device else 'host'} memory above the start ({unit_name})")
        upper.set_title(title)
        upper.legend(loc="best", framealpha=0.95)
        _draw_phases(lower, series)
    return figure


def _curve(timeline: Timeline, device: bool) -> tuple[int, ...]:
    if not device:
        return timeline.anonymous_bytes
    return timeline.device_bytes or (0,) * len(timeline.seconds)


def _has_file_pages(one: Series) -> bool:
    """Whether the pages of files that were resident would show."""
    more = max(one.timeline.resident_bytes) - max(one.timeline.anonymous_bytes)
    return more > 0.03 * max(one.final_bytes, *one.timeline.anonymous_bytes)


def _draw_curve(
    axes: Any, one: Series, look: dict[str, Any], unit_bytes: int, device: bool
) -> None:
    seconds, curve = one.timeline.seconds, _curve(one.timeline, device)
    sizes, peak = [size / unit_bytes for size in curve], max(curve)
    label = f"{one.label}: peak {format_bytes(peak)} ({peak / max(one.final_bytes, 1):.2f}x)"
    axes.plot(seconds, sizes, label=label, linewidth=2.2, **look)
    if not device and _has_file_pages(one):
        resident = [size / unit_bytes for size in one.timeline.resident_bytes]
        axes.plot(seconds, resident, color=look["color"], **_FILE_PAGES)
    at = curve.index(peak)
    axes.plot(seconds[at], sizes[at], "o", color=look["color"], markersize=6)


def _draw_phases(axes: Any, series: Sequence[Series]) -> None:
    """A strip for each load, in which its phases follow each other."""
    looks = {}
    for row, one in enumerate(series):
        phases = one.timeline.phases or (Phase("loading", 0.0),)
        ends = [phase.start_seconds for phase in phases[1:]] + [one.timeline.seconds[-1]]
        for phase, end in zip(phases, ends, strict=True):
            look = looks[phase.name] = _PHASES.get(phase.name, style.OTHER)
            start = phase.start_seconds
            style.bar(axes, row, end - start, start, look, thick=0.72)
    style.label_rows(axes, [one.label for one in series])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds")
    style.legend(axes.figure, looks)


def plot_peaks(measurements: Sequence[Any], title: str, path: str | Path | None = None) -> Any:
    """Draw the peak memory of measured loads as bars, with the size of the parameters in each.

    Args:
        measurements: of loads, as the command line's `Measurement`s: `name`, `error`,
            `peak_anonymous_bytes`, `peak_resident_bytes`, `parameter_bytes`, `median_seconds`;
            those with an error are left out.
        title: of the picture.
        path: a file to write as well.
    """
    good = [found for found in measurements if found.error is None]
    if not good:
        raise ArgumentError("There is nothing to draw: no load could be measured.")
    largest = max(max(m.peak_resident_bytes, m.parameter_bytes) for m in good)
    unit_bytes, unit_name = style.unit(largest)
    with style.picture(path, 2.1 + 0.58 * len(good)) as figure:
        axes, label = figure.subplots(), "size of the parameters"
        style.draw_peaks(axes, [_peak(m, unit_bytes) for m in good], style.ORANGE, label)
        axes.set_xlim(0, 1.25 * largest / unit_bytes)
        axes.set_xlabel(
            f"peak memory above the start of the load ({unit_name}); beside it, anonymous\n"
            "memory as a multiple of the parameters"
        )
        axes.set_title(title)
        style.legend(figure)
    return figure


def _peak(found: Any, unit_bytes: int) -> style.Peak:
    ratio = found.peak_anonymous_bytes / max(found.parameter_bytes, 1)
    resident = max(found.peak_resident_bytes, found.peak_anonymous_bytes)
    return style.Peak(
        label=found.name,
        held=found.peak_anonymous_bytes / unit_bytes,
        resident=resident / unit_bytes,
        mark=found.parameter_bytes / unit_bytes,
        text=f"{ratio:.2f}x",
        text_at=max(resident, found.parameter_bytes) / unit_bytes,
    )


def _short(source: str) -> str:
    """The last part of a folder's path; a hub name as it is."""
    return Path(source).name if Path(source).is_absolute() else source
