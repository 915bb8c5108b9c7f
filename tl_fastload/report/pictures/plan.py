"""A picture of a plan: predicted peaks against what is available, and the model by kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tl_fastload.ground.words import format_bytes
from tl_fastload.report.pictures.style import (
    BLACK,
    GREEN,
    ORANGE,
    OTHER,
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
    styled,
    unit,
    write_beside,
)

_KIND_STYLES = {
    "embedding": (SKY, "...."),
    "attention": (GREEN, "\\\\\\\\"),
    "MLP": (ORANGE, "////"),
    "norms and other": (BLACK, ""),
    "quantized": (YELLOW, "xxxx"),
    "buffers": OTHER,
}
# What is available is drawn unless the bars would become slivers.
_MOST_OF_LARGEST = 2.0
Row = tuple[str, int, int, int | None]


@styled
def plot_plan(plan: Any, path: str | Path | None = None) -> Any:
    """Draw the predicted peaks, lean and stock, against what is available, and the model by kind.

    Args:
        plan: the `LoadPlan` that `tl_fastload.plan` gave.
        path: a file to write as well.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    rows = _rows(plan)
    figure = figure_of(2.9 + 0.5 * len(rows))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(len(rows), 1))
    largest = max(plan.total_bytes, *(resident for _, _, resident, _ in rows))
    frees = [free for *_, free in rows if free is not None and free < _MOST_OF_LARGEST * largest]
    unit_bytes, unit_name = unit(max([largest, *frees]))
    for row, (_, held, resident, free) in enumerate(rows):
        draw_peak(upper, row, held / unit_bytes, resident / unit_bytes)
        ratio = f"{held / max(plan.total_bytes, 1):.2f}x"
        write_beside(upper, row, resident / unit_bytes, ratio)
        if free in frees:
            label = "available" if row == 0 else None
            draw_mark(upper, row, (free or 0) / unit_bytes, VERMILION, label)
    label_rows(upper, [label for label, *_ in rows])
    upper.set_xlim(0, 1.12 * max([largest, *frees]) / unit_bytes)
    upper.set_title(f"{Path(plan.source).name}: {_verdict(plan)}")
    _draw_kinds(lower, plan, unit_bytes)
    lower.set_xlabel(
        f"predicted peak memory ({unit_name}); beside it, its part that no file backs\n"
        "as a multiple of the model"
    )
    legend(figure)
    return finish(figure, path)


def _rows(plan: Any) -> list[Row]:
    """Label, memory that no file backs, all resident memory, and what is available."""
    free = plan.available_host_bytes
    held, resident = plan.peak_anonymous_bytes, plan.peak_host_bytes
    rows: list[Row] = [("lean, host", held, max(held, resident), free)]
    if plan.stock_peak_host_bytes is not None:
        held = plan.stock_peak_anonymous_bytes or plan.stock_peak_host_bytes
        rows.append(("stock, host", held, max(held, plan.stock_peak_host_bytes), free))
    for label, peak in (
        ("lean, device", plan.peak_device_bytes),
        ("stock, device", plan.stock_peak_device_bytes),
    ):
        if peak is not None:
            rows.append((label, peak, peak, plan.available_device_bytes))
    return rows


def _verdict(plan: Any) -> str:
    free = plan.available_host_bytes
    room = "" if free is None else f", {format_bytes(free)} of host memory can be had"
    return f"{'fits' if plan.fits else 'does NOT fit'}{room}"


def _draw_kinds(axes: Any, plan: Any, unit_bytes: int) -> None:
    """One bar: what the model consists of."""
    left = 0.0
    for kind, size_bytes in plan.parameter_bytes.items():
        if size_bytes == 0:
            continue
        style = _KIND_STYLES.get(kind, OTHER)
        label = f"{kind}: {format_bytes(size_bytes)}"
        bar(axes, 0, size_bytes / unit_bytes, left, style, label)
        left += size_bytes / unit_bytes
    write_beside(axes, 0, left, format_bytes(plan.total_bytes))
    label_rows(axes, ["the model"])
