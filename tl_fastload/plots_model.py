"""A picture of a loaded model: where its memory lies, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tl_fastload.display import format_bytes
from tl_fastload.memory_map import STATES, memory_map
from tl_fastload.plots_base import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    SKY,
    YELLOW,
    figure_of,
    finish,
    pictures,
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
def plot_memory_map(model: Any, path: str | Path | None = None) -> Any:
    """Draw where the memory of a loaded model lies, layer by layer: mapped, quantized or dense.

    In each bar attention lies at the bottom, the MLP above it, norms and buffers on top.

    Args:
        model: a `HookedTransformer`.
        path: a file to write as well.
    """
    parts = memory_map(model)
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
        fill, hatch = _STATE_STYLES[part.state]
        axes.bar(
            layers.index(part.layer),
            part.size_bytes / unit_bytes,
            bottom=tops[part.layer] / unit_bytes,
            width=0.84,
            color=fill,
            hatch=hatch,
            edgecolor=BLACK,
            linewidth=0.6,
        )
        tops[part.layer] += part.size_bytes
    _label_layers(axes, layers)
    axes.set_ylabel(f"memory ({unit_name})")
    axes.set_ylim(0, 1.08 * highest / unit_bytes)
    axes.set_title(
        f"{_model_name(model)}, {format_bytes(sum(totals.values()))}; "
        "from bottom to top: attention, MLP, norms and buffers",
    )
    _legend_of_states(figure, totals)
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


def _legend_of_states(figure: Any, totals: Mapping[str, int]) -> None:
    Patch = pictures().Patch
    patches = [
        Patch(
            facecolor=_STATE_STYLES[state][0],
            hatch=_STATE_STYLES[state][1],
            edgecolor=BLACK,
            label=f"{state}: {format_bytes(size_bytes)}",
        )
        for state, size_bytes in totals.items()
        if size_bytes
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)


def _model_name(model: Any) -> str:
    return str(getattr(model.cfg, "model_name", "") or "model")
