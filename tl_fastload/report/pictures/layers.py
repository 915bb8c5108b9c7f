"""A picture of a loaded model: where its memory lies, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl_fastload.ground.role import RoleOf
from tl_fastload.ground.words import format_bytes
from tl_fastload.report.memory_map import STATES, memory_map
from tl_fastload.report.pictures import style

_STATE_STYLES = {
    "dense": (style.BLUE, ""),
    "quantized": (style.ORANGE, "////"),
    "mapped": (style.SKY, "...."),
    "quantized and mapped": (style.YELLOW, "xxxx"),
    "on a device": (style.GREEN, "\\\\\\\\"),
}
_COMPONENTS = ("embedding", "attention", "MLP", "norms", "buffers")


def plot_memory_map(model: Any, role: RoleOf, path: str | Path | None = None) -> Any:
    """`tl_fastload.plots.plot_memory_map`, for models of any names.

    Args:
        model: any model.
        role: what each of its parameters and buffers is.
        path: a file to write as well.
    """
    parts = memory_map(model, role)
    tops = dict.fromkeys((part.layer for part in parts), 0)
    totals = dict.fromkeys(STATES, 0)
    for part in parts:
        tops[part.layer] += part.size_bytes
        totals[part.state] += part.size_bytes
    highest, layers = max(tops.values()), list(tops)
    unit_bytes, unit_name = style.unit(highest)
    with style.picture(path) as figure:
        axes = figure.subplots()
        tops = dict.fromkeys(layers, 0)
        order = {name: i for i, name in enumerate((*_COMPONENTS, *STATES))}
        for part in sorted(parts, key=lambda p: (order[p.component], order[p.state])):
            at, look = layers.index(part.layer), _STATE_STYLES[part.state]
            size, before = part.size_bytes / unit_bytes, tops[part.layer] / unit_bytes
            style.bar(axes, at, size, before, look, thick=0.84, upright=True)
            tops[part.layer] += part.size_bytes
        _label_layers(axes, layers)
        axes.set_ylabel(f"memory ({unit_name})")
        axes.set_ylim(0, 1.08 * highest / unit_bytes)
        name = getattr(model.cfg, "model_name", "") or "model"
        axes.set_title(
            f"{name}, {format_bytes(sum(totals.values()))}; "
            "from bottom to top: attention, MLP, norms and buffers",
        )
        shown = {f"{state}: {format_bytes(size)}": state for state, size in totals.items() if size}
        style.legend(figure, {label: _STATE_STYLES[state] for label, state in shown.items()})
    return figure


def _label_layers(axes: Any, layers: Sequence[str]) -> None:
    """Every layer has a number, or each second, fifth ... where there are many."""
    blocks = sum(layer.isdecimal() for layer in layers)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if blocks <= 16 * step or step == 100)
    shown = [i for i, name in enumerate(layers) if name.isdecimal() and int(name) % step == 0]
    ends = [i for i, name in enumerate(layers) if not name.isdecimal()]
    ticks = sorted([*shown, *ends])
    axes.set_xticks(ticks, [layers[i] if layers[i].isdecimal() else "" for i in ticks])
    for index in ends:
        below = {"xytext": (0, -22), "textcoords": "offset points", "ha": "center", "va": "top"}
        axes.annotate(layers[index], (index, 0), annotation_clip=False, **below)
    axes.set_xlabel("block")
