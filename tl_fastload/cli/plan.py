"""`tl-fastload plan`: what a load would take, before anything is read."""

from __future__ import annotations

from typing import Any

import typer

from tl_fastload.cli.console import draw, give, libraries_to_stderr, show_rows
from tl_fastload.cli.options import Drawn, Model, Written, command, lean_class


@command
def plan_command(
    model: Model, arguments: dict[str, Any], json: Written = None, plot: Drawn = None
) -> None:
    """Tell what loading would take and whether it fits, from headers alone.

    Exits with 1 if the model does not fit.

    [bold]Examples[/]

      tl-fastload plan gpt2-xl

      tl-fastload plan gpt2-xl --quantize nf4 --plot plan.png

    Args:
        json: Write the plan as JSON; - for standard output.
        plot: Draw the plan into this file (.png, .pdf ...).
    """
    with libraries_to_stderr():
        found = lean_class(model, arguments).plan(model, **arguments)
    give(json, found.to_dict, lambda: show_rows(found))
    draw(plot, found.plot)
    if not found.fits:
        raise typer.Exit(1)
