"""The figures as tables for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from benchmarks import bounds, bridge, cases, environment, formats, quantized, rows
from benchmarks.bounds import Check, Results
from benchmarks.measure import Case, Measurement

_WIDTH = 120


def load_table(results: Results, planned: Sequence[Case]) -> Table:
    """Memory and time of every load, ratios first."""
    table = Table(
        title="Loading, each in a fresh process, page cache warm (time: median, memory: largest)",
        caption="Memory above the imports, as multiples of the parameters' bytes (last column): "
        "highest private, highest resident with file pages (behind each: what tl_fastload.plan "
        "says), highest file pages, and private when loaded. floor: the time, as a multiple of the "
        "floor's. vs stock: times faster.",
    )
    columns = (
        *("peak anon", "plan", "resident", "plan"),
        *("file", "after", "floor", "vs stock", "s", "MB"),
    )
    return rows.grouped(table, columns, _load_row, results, planned)


def _load_row(results: Results, case: Case, found: Measurement) -> list[str]:
    floor = bounds.good(results, cases.floor(case.model, case.dtype))
    same = cases.stock(case.model, case.dtype, case.processed)
    stock = bounds.good(results, cases.with_adapter(same) if case.adapter else same)
    compared = case.road in ("lean", "stock", "reload") and case.loads == 1
    predicted = found.facts.get("predicted", {})
    memory = (
        found.peak_anonymous_bytes,
        predicted.get("anonymous_bytes"),
        found.peak_resident_bytes,
        predicted.get("resident_bytes"),
        found.peak_file_bytes,
        found.after_anonymous_bytes,
    )
    return [
        *(_times(None if size is None else bounds.ratio(size, found)) for size in memory),
        _times(bounds.faster(floor, found)) if case.loads == 1 else rows.NONE,
        _times(bounds.faster(found, stock)) if compared else rows.NONE,
        f"{found.median_seconds:.2f}",
        f"{found.parameter_bytes / 1e6:.0f}",
    ]


def forward_table(results: Results, planned: Sequence[Case]) -> Table:
    """Forward time of every loaded model, as multiples of transformers' and of stock's."""
    table = Table(
        title="Forward pass, batch 1 (medians)",
        caption="/hf: multiple of the time of transformers' own model. /stock: of stock's. "
        "log-probs: largest difference from transformers'. in use: resident memory after these "
        "passes, file pages included, as a multiple of the parameters' bytes.",
    )
    parts = ("/hf", "/stock", "ms")
    columns = [f"{n} tok {part}" for n in cases.FORWARD_TOKENS for part in parts]
    timed = [case for case in planned if case.forward_tokens]
    return rows.grouped(table, [*columns, "log-probs", "in use"], _forward_row, results, timed)


def _forward_row(results: Results, case: Case, found: Measurement) -> list[str]:
    reference = bounds.good(results, cases.transformers(case.model, case.dtype))
    stock = bounds.good(results, cases.stock(case.model, case.dtype, case.processed))
    row = []
    for tokens in cases.FORWARD_TOKENS:
        row.append(_times(bounds.forward_ratio(found, reference, tokens)))
        row.append(_times(bounds.forward_ratio(found, stock, tokens)))
        row.append(rows.milliseconds(found, tokens))
    row.append(rows.number(bounds.log_prob_difference(found, reference), ".1e"))
    return [*row, _times(bounds.ratio(found.used_resident_bytes, found))]


def _errors(results: Results) -> list[str]:
    """Why figures are missing: each reason once, with the cases that it concerns."""
    concerned: dict[str, list[str]] = {}
    for name, found in results.items():
        if found.error is not None:
            concerned.setdefault(found.error, []).append(name)
    return [f"{error}: {', '.join(names)}" for error, names in concerned.items()]


def checks_table(checks: Sequence[Check]) -> Table:
    """Every bound, and whether it was met."""
    table = Table(title="Bounds")
    table.add_column("promise", no_wrap=True)
    for column in ("measured", "bound", "aim", "result"):
        table.add_column(column, justify="right", no_wrap=True)
    by_subject: dict[str, list[Check]] = {}
    for check in checks:
        by_subject.setdefault(check.subject, []).append(check)
    for subject, about_it in by_subject.items():
        table.add_section()
        table.add_row(f"[bold]{subject}[/]")
        for check in about_it:
            table.add_row(*_check_row(check))
    return table


def _check_row(check: Check) -> list[str]:
    sign = ">=" if check.at_least else "<="
    measured = check.value is not None
    return [
        check.promise,
        rows.NONE if check.value is None else _number(check.value, check.unit),
        f"{sign} {_number(check.limit, check.unit)}" if measured else rows.NONE,
        rows.NONE if check.aim is None or not measured else _number(check.aim, check.unit),
        _verdict(check),
    ]


def _verdict(check: Check) -> str:
    if check.passed is None:
        return "[yellow]not measured[/]"
    if not check.passed:
        return "[bold red]FAIL[/]"
    return "[green]pass, aim reached[/]" if check.reached_aim else "[green]pass[/]"


def _times(value: float | None) -> str:
    return rows.NONE if value is None else _number(value, "x")


def _number(value: float, unit: str) -> str:
    if unit == "":
        return f"{value:.1e}"
    decimals = 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
    return f"{value:.{decimals}f}{'' if unit == 'x' else ' '}{unit}"


def report(
    results: Results,
    planned: Sequence[Case],
    checks: Sequence[Check],
    imported: Measurement | None,
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that a run found, as JSON."""
    return {
        "machine": dict(machine),
        "versions": environment.versions(),
        "page_cache": "warm",
        "cases": [asdict(case) | {"name": case.name} for case in planned],
        "measurements": [_as_json(results, case) for case in planned],
        "import": asdict(imported) if imported is not None else None,
        "checks": [asdict(check) | {"passed": check.passed} for check in checks],
    }


def _as_json(results: Results, case: Case) -> dict[str, Any]:
    """The measurement; of the log-probabilities only how far they are from transformers'."""
    found = results[case.name]
    facts = {name: fact for name, fact in found.facts.items() if name != "log_probs"}
    if case.kind:
        reference = bounds.good(results, quantized.exact_reference(case.model, case.kind))
    else:
        reference = bounds.good(results, cases.transformers(case.model, case.dtype))
    facts["log_prob_difference"] = bounds.log_prob_difference(found, reference)
    return asdict(found) | {"facts": facts}


def write_json(found: Mapping[str, Any], paths: Sequence[Path]) -> None:
    text = json.dumps(found, indent=1) + "\n"
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def show(
    console: Console,
    results: Results,
    planned: Sequence[Case],
    checks: Sequence[Check],
    imported: Measurement | None,
    machine: Mapping[str, Any],
) -> None:
    """Print all tables, and the machine and versions under them."""
    if not console.is_terminal:
        console.width = _WIDTH  # a pipe or a log has no width of its own
    parts: list[RenderableType] = []
    bridged, in_formats = bridge.of(planned), formats.of(planned)
    others = [case for case in planned if case not in (*bridged, *in_formats)]
    dense = [case for case in others if not case.kind]
    if any(case.road == "lean" for case in dense):
        parts.append(load_table(results, dense))
        if any(case.forward_tokens for case in dense):
            parts.append(forward_table(results, dense))
    if bridged:
        parts.append(bridge.table(results, bridged))
    if any(case.kind for case in others):
        parts.append(quantized.table(results, others))
    if in_formats:
        parts.append(formats.table(results, in_formats))
    if checks:
        parts.append(checks_table(checks))
    for part in parts:
        console.print(part)
    for error in _errors(results):
        console.print(f"[red]{escape(error)}[/]")
    if imported is not None and imported.error is None:
        base = imported.facts["transformer_lens_seconds"]
        console.print(
            f"import tl_fastload: {imported.median_seconds:.2f} s above "
            f"import transformer_lens ({base:.1f} s)"
        )
    for title, facts in (("Machine", machine), ("Versions", environment.versions())):
        console.print(f"{title}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
