"""`tl-fastload bench`: what loading costs, lean and stock, as a table, JSON and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.table import Table
from rich.text import Text

from tl_fastload.cli.bench.process import Measurement
from tl_fastload.cli.bench.synthetic import parse_shape
from tl_fastload.cli.console import console, say, write_json
from tl_fastload.cli.options import QUANTIZATIONS, Debug, json_option, picture_option
from tl_fastload.ground.words import format_bytes

if TYPE_CHECKING:
    from tl_fastload.cli.bench.loads import Contender
    from tl_fastload.cli.bench.run import Subject

_DTYPES = ("float32", "bfloat16", "float16")
_STRATEGIES = ("auto", "assign", "copy")

_Model = Annotated[
    str | None,
    typer.Argument(help="A folder, a TransformerLens name or a hub name.", show_default=False),
]
_Shape = Annotated[
    str | None,
    typer.Option(
        help="Random weights in this shape instead of a model: gpt2 or llama, then any of "
        "n_layers, d_model, n_heads, n_kv_heads, d_mlp, d_vocab, n_ctx and dtype (of the "
        "file), such as llama:d_model=512,n_layers=8."
    ),
]
_Dtypes = Annotated[
    list[str] | None, typer.Option(help="To load in; may be repeated.  [default: float32]")
]
_Strategies = Annotated[
    list[str] | None,
    typer.Option(help="auto, assign or copy; may be repeated.  [default: auto]"),
]
_Quantizations = Annotated[
    list[str] | None, typer.Option(help="Also quantized while loading; may be repeated.")
]
_Processing = Annotated[
    bool, typer.Option("--processing/--no-processing", help="Fold and centre the weights.")
]
_Stock = Annotated[
    bool,
    typer.Option(
        "--stock/--no-stock",
        help="Measure TransformerLens' own loader, too; it takes several times the memory.",
    ),
]
_Repeats = Annotated[int, typer.Option(min=1, help="Processes for each load.")]
_Keep = Annotated[
    Path | None, typer.Option(help="Write the model of --shape into this folder and keep it.")
]
_Json = Annotated[Path | None, json_option("the figures")]
_Plot = Annotated[
    Path | None,
    picture_option(
        "Draw the peaks into this file (.png, .pdf ...), and memory over time into a second one, "
        'whose name has "-timeline" added.'
    ),
]


class _Wanted(NamedTuple):
    """Every value of the options that may be repeated."""

    dtypes: list[str]
    strategies: list[str]
    kinds: list[str]


def bench(
    model: _Model = None,
    shape: _Shape = None,
    dtype: _Dtypes = None,
    strategy: _Strategies = None,
    quantize: _Quantizations = None,
    processing: _Processing = True,
    stock: _Stock = True,
    repeats: _Repeats = 3,
    keep: _Keep = None,
    json: _Json = None,
    plot: _Plot = None,
    debug: Debug = False,
) -> None:
    """Measure what loading costs, lean and stock, each load in a fresh process.

    Loads onto the CPU, page cache warm. Memory is read from outside the measured process.

    [bold]Examples[/]

      tl-fastload bench gpt2 --plot peaks.png

      tl-fastload bench --shape llama:d_model=512,n_layers=8 --dtype float32 --dtype bfloat16

      tl-fastload bench ./my-model --no-stock --strategy assign --strategy copy --json -
    """
    _check(model, shape, keep)
    wanted = _Wanted(
        _checked("--dtype", dtype or ["float32"], _DTYPES),
        _checked("--strategy", strategy or ["auto"], _STRATEGIES),
        _checked("--quantize", quantize or [], QUANTIZATIONS),
    )
    from tl_fastload.cli.bench.run import run

    contenders = _contenders(wanted, processing, stock)
    with _subject(model, shape, keep) as subject:
        found = run(subject, contenders, repeats, _announce)
    if str(json) == "-":
        write_json(_as_json(subject, contenders, found), Path("-"))
    else:
        _show(subject, contenders, found)
        if json is not None:
            write_json(_as_json(subject, contenders, found), json)
    if plot is not None:
        _draw(subject, contenders, found, plot)
    if any((one.error or "").startswith("failed") for one in found):
        raise typer.Exit(1)


def _check(model: str | None, shape: str | None, keep: Path | None) -> None:
    """Say what is wrong with the arguments before anything slow is imported."""
    if (model is None) == (shape is None):
        raise typer.BadParameter(
            "name a model or give --shape, one of the two.", param_hint="'MODEL' / '--shape'"
        )
    if shape is not None:
        parse_shape(shape)
    elif keep is not None:
        raise typer.BadParameter("goes with --shape only.", param_hint="'--keep'")


def _subject(
    model: str | None, shape: str | None, keep: Path | None
) -> AbstractContextManager[Subject]:
    from tl_fastload.cli.bench.run import named_subject, synthetic_subject

    if shape is not None:
        return synthetic_subject(parse_shape(shape), keep)
    return named_subject(str(model))


def _contenders(wanted: _Wanted, processing: bool, stock: bool) -> list[Contender]:
    """Every load to measure; what is compared stands together."""
    from tl_fastload.cli.bench.loads import Contender

    found = []
    for one in wanted.dtypes:
        if stock:
            found.append(Contender("stock", one, processing))
        found += [Contender("lean", one, processing, way) for way in wanted.strategies]
    first = wanted.dtypes[0]
    found += [Contender("lean", first, processing, quantize=kind) for kind in wanted.kinds]
    return found


def _checked(option: str, given: list[str], known: Sequence[str]) -> list[str]:
    for one in given:
        if one not in known:
            raise typer.BadParameter(
                f"{one!r} is none of {', '.join(known)}.", param_hint=f"'{option}'"
            )
    return list(dict.fromkeys(given))


def _announce(name: str, number: int, total: int) -> None:
    say(f"[{number}/{total}] {name}")


def _show(subject: Subject, contenders: Sequence[Contender], found: Sequence[Measurement]) -> None:
    from tl_fastload.cli.diagnosis import machine, versions

    table = Table(
        title=f"Loading {subject.label}, each in a fresh process",
        title_justify="left",
        caption="Peaks above the imports, and as multiples of the parameters' bytes: memory that "
        "no file backs, and all that is resident. vs stock: of the same dtype.",
        caption_justify="left",
    )
    for column in ("load", "peak anonymous", "peak resident", "parameters", "time", "vs stock"):
        table.add_column(column, justify="left" if column == "load" else "right")
    for contender, one in zip(contenders, found, strict=True):
        if one.error is None:
            table.add_row(one.name, *_cells(one, _stock_of(contender, contenders, found)))
        else:
            table.add_row(one.name, *["-"] * 5)
    console().print(table)
    for one in found:
        if one.error is not None:
            console().print(Text(f"{one.name}: {one.error}"))
    facts: dict[str, Any] = {**machine(), **versions()}
    facts["memory"] = format_bytes(facts.pop("memory_bytes"))
    present = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    console().print(Text(present, style="dim"))


def _stock_of(
    contender: Contender, contenders: Sequence[Contender], found: Sequence[Measurement]
) -> Measurement | None:
    for other, one in zip(contenders, found, strict=True):
        if other.loader == "stock" and other.dtype == contender.dtype and other != contender:
            return one if one.error is None else None
    return None


def _cells(one: Measurement, stock: Measurement | None) -> list[str]:
    versus = "-"
    if stock is not None:
        faster = stock.median_seconds / max(one.median_seconds, 1e-9)
        smaller = stock.peak_anonymous_bytes / max(one.peak_anonymous_bytes, 1)
        versus = f"{faster:.1f}x faster, {smaller:.1f}x less memory"
    return [
        _peak(one.peak_anonymous_bytes, one),
        _peak(one.peak_resident_bytes, one),
        format_bytes(one.parameter_bytes),
        f"{one.median_seconds:.2f} s",
        versus,
    ]


def _peak(size_bytes: int, one: Measurement) -> str:
    return f"{format_bytes(size_bytes)} ({size_bytes / max(one.parameter_bytes, 1):.2f}x)"


def _as_json(
    subject: Subject, contenders: Sequence[Contender], found: Sequence[Measurement]
) -> dict[str, Any]:
    from tl_fastload.cli.diagnosis import machine, versions

    measured = [
        {"contender": asdict(contender), **asdict(one)}
        for contender, one in zip(contenders, found, strict=True)
    ]
    return {
        "model": subject.label,
        "page_cache": "warm",
        "machine": machine(),
        "versions": versions(),
        "measurements": measured,
    }


def _draw(
    subject: Subject,
    contenders: Sequence[Contender],
    found: Sequence[Measurement],
    path: Path,
) -> None:
    from tl_fastload.report.pictures import loads

    loads.plot_peaks(found, f"Peak memory while loading {subject.label}", path)
    say(f"Written: {path}")
    # The first dtype's lean and stock loads: more lines than that cannot be told apart.
    of_one_dtype = [
        (contender, one)
        for contender, one in zip(contenders, found, strict=True)
        if one.timeline is not None and contender.dtype == contenders[0].dtype
    ]
    series = [
        loads.Series(contender.loader, one.timeline, one.parameter_bytes)
        for loader in ("lean", "stock")
        for contender, one in of_one_dtype
        if contender.loader == loader and contender.quantize is None and one.timeline is not None
    ]
    chosen = list({one.label: one for one in reversed(series)}.values())[::-1]
    if chosen:
        second = path.with_name(f"{path.stem}-timeline{path.suffix}")
        title = f"Memory while loading {subject.label}, {contenders[0].dtype}"
        loads.plot_timelines(chosen, title, second)
        say(f"Written: {second}")
