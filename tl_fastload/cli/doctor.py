"""`tl-fastload doctor`: what of this machine matters for loading, and what to fix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from tl_fastload.cli.console import console, give
from tl_fastload.cli.options import Written, command

if TYPE_CHECKING:
    from tl_fastload.cli.diagnosis import Diagnosis


@command
def doctor(json: Written = None) -> None:
    """Show versions, devices, kernels, caches and memory limits, and what to fix.

    Runs the kernels of bitsandbytes on small matrices, so that "works" means that they do.

    [bold]Examples[/]

      tl-fastload doctor

      tl-fastload doctor --json facts.json

    Args:
        json: Write the facts as JSON; - for standard output.
    """
    from tl_fastload.cli.diagnosis import diagnose

    found = diagnose()
    give(json, found.to_dict, lambda: _show(found))


def _show(found: Diagnosis) -> None:
    out = console()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, text in found.rows():
        table.add_row(label, Text(text))
    out.print(table)
    out.print()
    if not found.fixes:
        out.print("[green]Nothing to fix.[/]")
        return
    out.print("[bold]To fix[/]")
    for fix in found.fixes:
        out.print(Text(f"- {fix}"))
