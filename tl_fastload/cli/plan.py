"""`tl-fastload plan`: what a load would take, before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tl_fastload.cli.console import libraries_to_stderr, say, show_rows, write_json
from tl_fastload.cli.options import Debug, Model, json_option, picture_option


def plan_command(
    model: Model,
    arguments: dict[str, Any],
    json: Annotated[Path | None, json_option("the plan")] = None,
    plot: Annotated[
        Path | None, picture_option("Draw the plan into this file (.png, .pdf ...).")
    ] = None,
    debug: Debug = False,
) -> None:
    """Tell what loading would take and whether it fits, from headers alone.

    Exits with 1 if the model does not fit.

    [bold]Examples[/]

      tl-fastload plan gpt2-xl

      tl-fastload plan gpt2-xl --quantize nf4 --plot plan.png
    """
    from tl_fastload import plan

    with libraries_to_stderr():
        found = plan(model, **arguments)
    if json is not None:
        write_json(found.to_dict(), json)
    if str(json) != "-":
        show_rows(found)
    if plot is not None:
        found.plot(path=plot)
        say(f"Written: {plot}")
    if not found.fits:
        raise typer.Exit(1)
