"""A picture of a plan: predicted peaks against what is available, and the model by kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tl_fastload.ground.words import format_bytes
from tl_fastload.report.pictures import style

_KIND_STYLES = {
    "embedding": (style.SKY, "...."),
    "attention": (style.GREEN, "\\\\\\\\"),
    "MLP": (style.ORANGE, "////"),
    "norms and other": (style.BLACK, ""),
    "quantized": (style.YELLOW, "xxxx"),
    "buffers": style.OTHER,
}
# What is available is drawn unless the bars would become slivers.
_MOST_OF_LARGEST = 2.0


def plot_plan(plan: Any, path: str | Path | None = None) -> Any:
    """Draw the predicted peaks, lean and stock, against what is available, and the model by kind.

    Args:
        plan: the `LoadPlan` that `tl_fastload.plan` gave.
        path: a file to write as well.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    rows = _rows(plan)
    largest = max(plan.total_bytes, *(resident for _, _, resident, _ in rows))
    frees = [free for *_, free in rows if free is not None and free < _MOST_OF_LARGEST * largest]
    unit_bytes, unit_name = style.unit(max([largest, *frees]))
    peaks = [
        style.Peak(
            label=label,
            held=held / unit_bytes,
            resident=resident / unit_bytes,
            mark=free / unit_bytes if free in frees else None,
            text=f"{held / max(plan.total_bytes, 1):.2f}x",
            text_at=resident / unit_bytes,
        )
        for label, held, resident, free in rows
    ]
    with style.picture(path, 2.9 + 0.5 * len(rows)) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(len(rows), 1))
        style.draw_peaks(upper, peaks, style.VERMILION, "available")
        upper.set_xlim(0, 1.12 * max([largest, *frees]) / unit_bytes)
        upper.set_title(f"{Path(plan.source).name}: {_verdict(plan)}")
        _draw_kinds(lower, plan, unit_bytes)
        lower.set_xlabel(
            f"predicted peak memory ({unit_name}); beside it, anonymous memory\n"
            "as a multiple of the model"
        )
        style.legend(figure)
    return figure


def _rows(plan: Any) -> list[tuple[str, int, int, Any]]:
    """Label, anonymous memory, all resident memory, and what is available."""
    device, stock = plan.available_device_bytes, plan.stock_peak_host_bytes
    held = plan.stock_peak_anonymous_bytes or stock
    rows = [
        ("lean, host", plan.peak_anonymous_bytes, plan.peak_host_bytes, plan.available_host_bytes),
        ("stock, host", held, stock, plan.available_host_bytes),
        ("lean, device", plan.peak_device_bytes, plan.peak_device_bytes, device),
        ("stock, device", plan.stock_peak_device_bytes, plan.stock_peak_device_bytes, device),
    ]
    known = [row for row in rows if row[2] is not None]
    return [(label, held, max(held, resident), free) for label, held, resident, free in known]


def _verdict(plan: Any) -> str:
    free = plan.available_host_bytes
    room = "" if free is None else f", {format_bytes(free)} of host memory can be had"
    return f"{'fits' if plan.fits else 'does NOT fit'}{room}"


def _draw_kinds(axes: Any, plan: Any, unit_bytes: int) -> None:
    """One bar: what the model consists of."""
    left = 0.0
    for kind, size_bytes in plan.parameter_bytes.items():
        if size_bytes:
            look, label = _KIND_STYLES.get(kind, style.OTHER), f"{kind}: {format_bytes(size_bytes)}"
            style.bar(axes, 0, size_bytes / unit_bytes, left, look, label)
            left += size_bytes / unit_bytes
    style.write_beside(axes, 0, left, format_bytes(plan.total_bytes))
    style.label_rows(axes, ["the model"])
