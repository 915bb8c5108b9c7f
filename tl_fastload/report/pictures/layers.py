"""A picture of a loaded model: where its memory lies, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl_fastload.ground.role import RoleOf
from tl_fastload.ground.words import format_bytes
from tl_fastload.report.memory_map import STATES, memory_map
from tl_fastload.report.pictures.style import (
    BLUE,
    GREEN,
    ORANGE,
    SKY,
    YELLOW,
    bar,
    figure_of,
    finish,
    legend,
    styled,
    unit,
)

_STATE_STYLES = {
    "dense": (BLUE, ""),
    "quantized": (ORANGE, "////"),
    "mapped": (SKY, "...."),
    "quantized and mapped": (YELLOW, "xxxx"),
    "on a device": (GREEN, "\\\\\\\\"),
}


@styled
def plot_memory_map(model: Any, role: RoleOf, path: str | Path | None = None) -> Any:
    """`tl_fastload.plots.plot_memory_map`, for models of any names.

    Args:
        model: any model.
        role: what each of its parameters and buffers is.
        path: a file to write as well.
    """
    parts = memory_map(model, role)
    figure = figure_of()
    axes = figure.subplots()
    layers = list(dict.fromkeys(part.layer for part in parts))
    tops = dict.fromkeys(layers, 0)
    totals = dict.fromkeys(STATES, 0)
    order = ("embedding", "attention", "MLP", "norms", "buffers")
    for part in parts:
        totals[part.state] += part.size_bytes
    highest = max(sum(p.size_bytes for p in parts if p.layer == layer) for layer in layers)
    unit_bytes, unit_name = unit(highest)
    for part in sorted(parts, key=lambda p: (order.index(p.component), STATES.index(p.state))):
        bar(
            axes,
            layers.index(part.layer),
            part.size_bytes / unit_bytes,
            tops[part.layer] / unit_bytes,
            _STATE_STYLES[part.state],
            thick=0.84,
            upright=True,
        )
        tops[part.layer] += part.size_bytes
    _label_layers(axes, layers)
    axes.set_ylabel(f"memory ({unit_name})")
    axes.set_ylim(0, 1.08 * highest / unit_bytes)
    axes.set_title(
        f"{_model_name(model)}, {format_bytes(sum(totals.values()))}; "
        "from bottom to top: attention, MLP, norms and buffers",
    )
    shown = {f"{state}: {format_bytes(size)}": state for state, size in totals.items() if size}
    legend(figure, {label: _STATE_STYLES[state] for label, state in shown.items()})
    return finish(figure, path)


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


def _model_name(model: Any) -> str:
    return str(getattr(model.cfg, "model_name", "") or "model")
