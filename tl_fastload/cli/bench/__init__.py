"""`tl-fastload bench`: what loading costs, lean and stock, as a table, JSON and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tl_fastload.cli.bench.synthetic import ITEM_BYTES, checked_model
from tl_fastload.cli.console import console, draw, give, say
from tl_fastload.cli.options import QUANTIZATIONS, ROADS, Drawn, Written, check_known, command
from tl_fastload.ground.words import format_bytes

if TYPE_CHECKING:
    from tl_fastload.cli.bench.loads import Contender
    from tl_fastload.cli.bench.process import Measurement

_STRATEGIES = ("auto", "assign", "copy")

Found = Mapping["Contender", "Measurement"]


@command
def bench(
    model: Annotated[str | None, typer.Argument()] = None,
    shape: str | None = None,
    dtype: list[str] | None = None,
    strategy: list[str] | None = None,
    quantize: list[str] | None = None,
    road: str | None = None,
    processing: bool = True,
    stock: bool = True,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    keep: Path | None = None,
    json: Written = None,
    plot: Drawn = None,
) -> None:
    """Measure what loading costs, lean and stock, each load in a fresh process.

    Loads onto the CPU, page cache warm. Memory is read from outside the measured process.

    [bold]Examples[/]

      tl-fastload bench gpt2 --plot peaks.png

      tl-fastload bench --shape llama:d_model=512,n_layers=8 --dtype float32 --dtype bfloat16

      tl-fastload bench ./my-model --no-stock --strategy assign --strategy copy --json -

    Args:
        model: A folder, a TransformerLens name or a hub name.
        shape: Random weights in this shape instead of a model: gpt2 or llama, then any of n_layers,
            d_model, n_heads, n_kv_heads, d_mlp, d_vocab, n_ctx and dtype (of the file), such as
            llama:d_model=512,n_layers=8.
        dtype: To load in, by default float32; may be repeated.
        strategy: auto, assign or copy, by default auto; may be repeated.
        quantize: Also quantized while loading, in the narrowest dtype: 8bit, nf4 or fp4; may be
            repeated. Quantizing takes time, once: save what it gives.
        road: Into which of TransformerLens' classes: hooked (HookedTransformer) or bridge
            (TransformerBridge); by default the first of the two that is installed.
        processing: Fold and centre the weights.
        stock: Measure TransformerLens' own loader, too; it takes several times the memory.
        repeats: Processes for each load.
        keep: Write the model of --shape into this folder and keep it.
        json: Write the figures as JSON; - for standard output.
        plot: Draw the peaks into this file (.png, .pdf ...), and memory over time into a second
            one, whose name has "-timeline" added.
    """
    dtypes, strategies, kinds = dtype or ["float32"], strategy or ["auto"], quantize or []
    what = checked_model(model, shape)
    if keep is not None and shape is None:
        raise typer.BadParameter("goes with --shape only.", param_hint="'--keep'")
    check_known("--dtype", dtypes, tuple(ITEM_BYTES))
    check_known("--strategy", strategies, _STRATEGIES)
    check_known("--quantize", kinds, QUANTIZATIONS)
    check_known("--road", [road] if road else [], ROADS)
    from tl_fastload.cli.bench import run
    from tl_fastload.cli.bench.loads import Contender
    from tl_fastload.faces import installed, lean_class

    on = road or next(iter(installed()), "hooked")
    if on == "bridge" and not processing:
        _check_booted(strategies, kinds)
    contenders = []  # what is compared stands together
    for one in dict.fromkeys(dtypes):
        contenders += [Contender("stock", one, processing, road=on)] if stock else []
        contenders += [Contender("lean", one, processing, way, road=on) for way in strategies]
    narrow = min(dtypes, key=ITEM_BYTES.__getitem__)  # what is not quantized is best in as few bits
    contenders += [Contender("lean", narrow, processing, quantize=kind, road=on) for kind in kinds]
    with run.subject_of(what, lean_class(on)._road.aliases(), keep) as subject:
        found = run.run(subject, list(dict.fromkeys(contenders)), repeats, say)
    label = subject.label
    give(json, lambda: _as_json(label, found), lambda: _show(label, found))
    if plot is not None:
        _draw(label, found, plot)
    if any((one.error or "").startswith("failed") for one in found.values()):
        raise typer.Exit(1)


def _check_booted(strategies: list[str], kinds: list[str]) -> None:
    """Raise BadParameter for options that booting a bridge, which processes nothing, has not."""
    for option, given in (("--strategy", set(strategies) - {"auto"}), ("--quantize", kinds)):
        if given:
            raise typer.BadParameter(
                "a bridge that is not processed is booted, which has no such choice: leave it out, "
                "or leave out --no-processing.",
                param_hint=f"'{option}'",
            )


def _show(label: str, found: Found) -> None:
    from tl_fastload.cli.diagnosis import machine, versions

    table = Table(
        title=f"Loading {label}, each in a fresh process",
        title_justify="left",
        caption="Peaks above the imports, and as multiples of the parameters' bytes: anonymous "
        "memory, and all that is resident (with the pages of mapped files). vs stock: how many "
        "times faster, and how many times less anonymous memory, than stock in the same dtype.",
        caption_justify="left",
    )
    for column in ("load", "peak anonymous", "peak resident", "parameters", "time", "vs stock"):
        table.add_column(column, justify="left" if column == "load" else "right")
    for contender, one in found.items():
        stock = found.get(replace(contender, loader="stock", strategy="auto", quantize=None))
        table.add_row(one.name, *_cells(one, None if one is stock else stock))
    console().print(table)
    for one in found.values():
        if one.error is not None:
            console().print(Text(f"{one.name}: {one.error}"))
    facts: dict[str, Any] = {**machine(), **versions()}
    facts["memory"] = format_bytes(facts.pop("memory_bytes"))
    present = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    console().print(Text(present, style="dim"))


def _cells(one: Measurement, stock: Measurement | None) -> list[str]:
    """What stands in a row behind the name."""
    if one.error is not None:
        return ["-"] * 5
    versus = "-"
    if stock is not None and stock.error is None:
        faster = stock.median_seconds / max(one.median_seconds, 1e-9)
        smaller = stock.peak_anonymous_bytes / max(one.peak_anonymous_bytes, 1)
        versus = f"{faster:.1f}x, {smaller:.1f}x"
    return [
        _peak(one.peak_anonymous_bytes, one),
        _peak(one.peak_resident_bytes, one),
        format_bytes(one.parameter_bytes),
        f"{one.median_seconds:.2f} s",
        versus,
    ]


def _peak(size_bytes: int, one: Measurement) -> str:
    return f"{format_bytes(size_bytes)} ({size_bytes / max(one.parameter_bytes, 1):.2f}x)"


def _as_json(label: str, found: Found) -> dict[str, Any]:
    from tl_fastload.cli.diagnosis import machine, versions

    return {
        "model": label,
        "page_cache": "warm",
        "machine": machine(),
        "versions": versions(),
        "measurements": [{"contender": asdict(who), **asdict(one)} for who, one in found.items()],
    }


def _draw(label: str, found: Found, path: Path) -> None:
    """Draw the peaks; and memory over time of the first dtype's loads, lean in front: more lines
    than that cannot be told apart.
    """
    from tl_fastload import plots

    title = f"Peak memory while loading {label}"
    draw(path, partial(plots.plot_peaks, list(found.values()), title))
    dtype = next(iter(found)).dtype
    series: dict[str, plots.Series] = {}
    for who, one in sorted(found.items(), key=lambda pair: pair[0].loader):
        if one.timeline is not None and who.dtype == dtype and who.quantize is None:
            line = plots.Series(who.loader, one.timeline, one.parameter_bytes)
            series.setdefault(who.loader, line)
    if series:
        title = f"Memory while loading {label}, {dtype}"
        second = path.with_name(f"{path.stem}-timeline{path.suffix}")
        draw(second, partial(plots.plot_timelines, list(series.values()), title))
