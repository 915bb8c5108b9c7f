"""Pictures of loads and models, with matplotlib; imported only when one is drawn.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which colour-blind readers
can tell apart; line styles and hatches carry the same message in grey. Figures are made without
pyplot, so that drawing needs no display and leaves no state behind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from tl_fastload.errors import ArgumentError, MissingPackageError
from tl_fastload.measure import Measurement
from tl_fastload.memory_map import STATES, memory_map
from tl_fastload.report import LoadReport, format_bytes
from tl_fastload.timeline import Phase, Timeline

_BLUE, _VERMILION, _GREEN, _ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
_SKY, _PURPLE, _YELLOW, _BLACK = "#56B4E9", "#CC79A7", "#F0E442", "#000000"
_SIZE_INCHES = (8.0, 5.0)
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_LINES = (
    {"color": _BLUE, "linestyle": "-"},
    {"color": _VERMILION, "linestyle": (0, (6, 2))},
    {"color": _GREEN, "linestyle": (0, (4, 2, 1, 2))},
    {"color": _PURPLE, "linestyle": (0, (1, 1.2))},
)
_PHASES = {
    "configuration": ("#FFFFFF", "...."),
    "recording": (_YELLOW, ""),
    "placing": (_SKY, "////"),
    "transformers loads": (_PURPLE, "\\\\\\\\"),
    "conversion": (_BLACK, ""),
    "processing": (_ORANGE, "xxxx"),
}
_STATE_STYLES = {
    "dense": (_BLUE, ""),
    "quantized": (_ORANGE, "////"),
    "mapped": (_SKY, "...."),
    "quantized and mapped": (_YELLOW, "xxxx"),
    "on a device": (_GREEN, "\\\\\\\\"),
}


Draw = TypeVar("Draw", bound=Callable[..., Any])


def _styled(draw: Draw) -> Draw:
    """Draw in our own style, whatever the user's settings are."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Any:
        with _pictures().style():
            return draw(*args, **kwargs)

    return cast(Draw, styled)


@dataclass(frozen=True)
class Series:
    """A load to draw: its name, its memory over time, and the bytes of the parameters it made."""

    label: str
    timeline: Timeline
    final_bytes: int


def plot_load(report: LoadReport, stock: Any = None, path: str | Path | None = None) -> Any:
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


@_styled
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
    figure = _figure()
    upper, lower = figure.subplots(
        2, 1, sharex=True, height_ratios=(5, 0.35 + 0.3 * len(series)), gridspec_kw={"hspace": 0.06}
    )
    device = any(any(one.timeline.device_bytes) for one in series)
    highest = max(max(_curve(one.timeline, device)) for one in series)
    files = not device and any(_has_file_pages(one) for one in series)
    if files:
        highest = max(highest, *(max(one.timeline.resident_bytes) for one in series))
    finals = sorted({one.final_bytes for one in series})
    unit_bytes, unit = _unit(max(highest, *finals))
    for number, one in reversed(list(enumerate(series))):
        _draw_curve(upper, one, _LINES[number % len(_LINES)], unit_bytes, device, number == 0)
    _draw_finals(upper, finals, unit_bytes)
    upper.set_ylim(0, 1.16 * max(highest, *finals) / unit_bytes)
    upper.set_xlim(0, 1.01 * max(one.timeline.seconds[-1] for one in series))
    upper.set_ylabel(f"{'device' if device else 'host'} memory above the start ({unit})")
    upper.set_title(title)
    handles, labels = upper.get_legend_handles_labels()
    if files:
        handles.append(_file_pages_handle())
        labels.append("with file pages")
    upper.legend(handles, labels, loc="best", framealpha=0.95)
    _draw_phases(lower, series)
    return _finish(figure, path)


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
    return _pictures().Line2D([], [], color=_BLACK, linewidth=1.1, linestyle=":")


def _draw_finals(axes: Any, finals: Sequence[int], unit_bytes: int) -> None:
    for number, size_bytes in enumerate(finals):
        label = f"parameters: {format_bytes(size_bytes)}"
        style = ("-.", (0, (8, 3)))[number % 2]
        axes.axhline(
            size_bytes / unit_bytes, color=_BLACK, linewidth=1.2, linestyle=style, label=label
        )


def _draw_phases(axes: Any, series: Sequence[Series]) -> None:
    """A strip for each load, in which its phases follow each other."""
    Patch = _pictures().Patch
    names: list[str] = []
    for row, one in enumerate(series):
        phases = one.timeline.phases or (Phase("loading", 0.0),)
        ends = [phase.start_seconds for phase in phases[1:]] + [one.timeline.seconds[-1]]
        for phase, end in zip(phases, ends, strict=True):
            fill, hatch = _PHASES.get(phase.name, ("#DDDDDD", ""))
            axes.barh(
                row,
                end - phase.start_seconds,
                left=phase.start_seconds,
                height=0.72,
                color=fill,
                hatch=hatch,
                edgecolor=_BLACK,
                linewidth=0.6,
            )
            if phase.name not in names:
                names.append(phase.name)
    axes.set_yticks(range(len(series)), [one.label for one in series])
    axes.set_ylim(len(series) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds")
    patches = [
        Patch(
            facecolor=_PHASES.get(name, ("#DDDDDD", ""))[0],
            hatch=_PHASES.get(name, ("", ""))[1],
            edgecolor=_BLACK,
            linewidth=0.6,
            label=name,
        )
        for name in names
    ]
    axes.figure.legend(
        handles=patches, loc="outside lower center", ncols=min(len(patches), 6), frameon=False
    )


@_styled
def plot_peaks(
    measurements: Sequence[Measurement], title: str, path: str | Path | None = None
) -> Any:
    """Draw the peak memory of measured loads as bars, with the size of the parameters in each.

    Args:
        measurements: of loads; those with an error are left out.
        title: of the picture.
        path: a file to write as well.
    """
    good = [found for found in measurements if found.error is None]
    if not good:
        raise ArgumentError("There is nothing to draw: no load could be measured.")
    figure = _figure(2.1 + 0.58 * len(good))
    axes = figure.subplots()
    largest = max(max(m.peak_resident_bytes, m.parameter_bytes) for m in good)
    unit_bytes, unit = _unit(largest)
    for row, found in enumerate(good):
        _draw_peak(axes, row, found, unit_bytes, labelled=row == 0)
    axes.set_yticks(range(len(good)), [found.name for found in good])
    axes.set_ylim(len(good) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * largest / unit_bytes)
    axes.set_xlabel(
        f"peak memory above the start of the load ({unit}); beside it, its part that no file backs\n"
        "as a multiple of the parameters, and the time"
    )
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return _finish(figure, path)


def _draw_peak(axes: Any, row: int, found: Measurement, unit_bytes: int, labelled: bool) -> None:
    anonymous = found.peak_anonymous_bytes / unit_bytes
    resident = max(found.peak_resident_bytes, found.peak_anonymous_bytes) / unit_bytes
    final = found.parameter_bytes / unit_bytes
    outline = {"edgecolor": _BLACK, "linewidth": 0.8, "height": 0.6}
    axes.barh(
        row,
        anonymous,
        color=_BLUE,
        label="memory that no file backs" if labelled else None,
        **outline,
    )
    axes.barh(
        row,
        resident - anonymous,
        left=anonymous,
        color="#FFFFFF",
        hatch="////",
        label="file pages on top" if labelled else None,
        **outline,
    )
    axes.plot(
        [final, final],
        [row - 0.42, row + 0.42],
        color=_ORANGE,
        linewidth=4,
        solid_capstyle="butt",
        label="size of the parameters" if labelled else None,
    )
    ratio = found.peak_anonymous_bytes / max(found.parameter_bytes, 1)
    beside = max(resident, final)
    axes.annotate(
        f"{ratio:.2f}x, {found.median_seconds:.2f} s",
        (beside, row),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
    )


@_styled
def plot_memory_map(model: Any, path: str | Path | None = None) -> Any:
    """Draw where the memory of a loaded model lies, layer by layer: mapped, quantized or dense.

    In each bar attention lies at the bottom, the MLP above it, norms and buffers on top.

    Args:
        model: a `HookedTransformer`.
        path: a file to write as well.
    """
    parts = memory_map(model)
    figure = _figure()
    axes = figure.subplots()
    layers = list(dict.fromkeys(part.layer for part in parts))
    tops = dict.fromkeys(layers, 0)
    totals = dict.fromkeys(STATES, 0)
    order = ("embedding", "attention", "MLP", "norms", "buffers")
    for part in parts:
        totals[part.state] += part.size_bytes
    highest = max(sum(p.size_bytes for p in parts if p.layer == layer) for layer in layers)
    unit_bytes, unit = _unit(highest)
    for part in sorted(parts, key=lambda p: (order.index(p.component), STATES.index(p.state))):
        fill, hatch = _STATE_STYLES[part.state]
        axes.bar(
            layers.index(part.layer),
            part.size_bytes / unit_bytes,
            bottom=tops[part.layer] / unit_bytes,
            width=0.84,
            color=fill,
            hatch=hatch,
            edgecolor=_BLACK,
            linewidth=0.6,
        )
        tops[part.layer] += part.size_bytes
    _label_layers(axes, layers)
    axes.set_ylabel(f"memory ({unit})")
    axes.set_ylim(0, 1.08 * highest / unit_bytes)
    axes.set_title(
        f"{_model_name(model)}, {format_bytes(sum(totals.values()))}; "
        "from bottom to top: attention, MLP, norms",
    )
    _legend_of_states(figure, totals)
    return _finish(figure, path)


def _label_layers(axes: Any, layers: Sequence[str]) -> None:
    """Every layer has a number, or each second, fifth ... where there are many."""
    blocks = sum(layer.isdecimal() for layer in layers)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if blocks <= 16 * step or step == 100)
    shown = [i for i, name in enumerate(layers) if name.isdecimal() and int(name) % step == 0]
    ends = [i for i, name in enumerate(layers) if not name.isdecimal()]
    ticks = sorted([*shown, *ends])
    axes.set_xticks(ticks, [layers[i] if layers[i].isdecimal() else "" for i in ticks])
    for index in ends:
        axes.annotate(
            layers[index],
            (index, 0),
            xytext=(0, -22),
            textcoords="offset points",
            ha="center",
            va="top",
            annotation_clip=False,
        )
    axes.set_xlabel("block")


def _legend_of_states(figure: Any, totals: Mapping[str, int]) -> None:
    Patch = _pictures().Patch
    patches = [
        Patch(
            facecolor=_STATE_STYLES[state][0],
            hatch=_STATE_STYLES[state][1],
            edgecolor=_BLACK,
            label=f"{state}: {format_bytes(size_bytes)}",
        )
        for state, size_bytes in totals.items()
        if size_bytes
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)


def _model_name(model: Any) -> str:
    return str(getattr(model.cfg, "model_name", "") or "model")


def _short(source: str) -> str:
    """The last part of a folder's path; a hub name as it is."""
    return Path(source).name if Path(source).is_absolute() else source


def _unit(size_bytes: float) -> tuple[int, str]:
    return next(((size, name) for size, name in _UNITS if size_bytes >= size), (1, "bytes"))


def _pictures() -> Any:
    """The module that imports matplotlib."""
    try:
        from tl_fastload import picture
    except ImportError as error:
        raise MissingPackageError(
            "Pictures need matplotlib, which is not installed or does not work here "
            f'({error}): pip install "tl-fastload[plots]".'
        ) from error
    return picture


def _figure(height_inches: float = _SIZE_INCHES[1]) -> Any:
    return _pictures().Picture(_SIZE_INCHES[0], height_inches)


def _finish(figure: Any, path: str | Path | None) -> Any:
    if path is not None:
        figure.write(path)
    return figure
