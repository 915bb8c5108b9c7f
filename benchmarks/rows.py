"""Tables with a line for each group of cases, and a row for each case."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from benchmarks.bounds import Results, good
from benchmarks.measure import Case, Measurement

NONE = "-"
Row = Callable[[Results, Case, Measurement], list[str]]


def grouped(
    table: Table,
    columns: Sequence[str],
    row: Row,
    results: Results,
    planned: Sequence[Case],
    group_of: Callable[[Case], str] = lambda case: f"{case.model} {case.dtype}",
) -> Table:
    """Fill a table: a line that names each group, then a row for each of its loads.

    Args:
        table: with no columns yet.
        columns: their titles, but for the first one's.
        row: the cells of a case that was measured, but for the first.
        results: what was measured.
        planned: the cases, those of a group one after the other.
        group_of: how the names of a group's cases begin.
    """
    table.add_column("load", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    previous = ""
    for case in planned:
        group = group_of(case)
        if group != previous:
            table.add_section()
            table.add_row(f"[bold]{group}[/]")
        previous = group
        label, found = case.name.removeprefix(group).strip(), good(results, case)
        table.add_row(label, *(row(results, case, found) if found else ["[red]none[/]"]))
    return table


def milliseconds(found: Measurement, tokens: int) -> str:
    """The time of a forward pass, if it was taken."""
    seconds = found.facts["forward_seconds"].get(str(tokens))
    return NONE if seconds is None else f"{seconds * 1e3:.1f}"


def number(value: float | None, form: str, unit: str = "") -> str:
    """A number in a format such as ".2f", if there is one."""
    return NONE if value is None else f"{value:{form}}{unit}"
