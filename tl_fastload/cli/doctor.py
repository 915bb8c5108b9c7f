"""`tl-fastload doctor`: what of this machine matters for loading, and what to fix."""

from __future__ import annotations

from rich.text import Text

from tl_fastload.cli.console import console, give, show_rows
from tl_fastload.cli.options import Written, command


@command
def doctor(json: Written = None) -> None:
    """Show versions, devices, kernels, caches and memory limits, and what to fix.

    Multiplies by a small matrix of each quantized format, so that "works" means that it does.

    [bold]Examples[/]

      tl-fastload doctor

      tl-fastload doctor --json facts.json

    Args:
        json: Write the facts as JSON; - for standard output.
    """
    from tl_fastload.cli.diagnosis import diagnose

    found = diagnose()

    def show() -> None:
        show_rows(found)
        out = console()
        out.print("\n[bold]To fix[/]" if found.fixes else "\n[green]Nothing to fix.[/]")
        for fix in found.fixes:
            out.print(Text(f"- {fix}"))

    give(json, found.to_dict, show)
