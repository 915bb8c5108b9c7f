"""The command `tl-fastload`: which commands there are, how errors look, exit codes.

Exit codes: 0 all went well; 1 something failed; 2 the command was not understood (no such option, a
value that it cannot have); 130 Ctrl-C; 143 ended by a signal (SIGTERM).
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tl_fastload.cli.bench import bench
from tl_fastload.cli.cache import cache_app
from tl_fastload.cli.commands import doctor, load, plan, save
from tl_fastload.cli.console import Terminated, end_on_sigterm, show_error
from tl_fastload.cli.options import Debug, as_options
from tl_fastload.errors import ArgumentError, LeanLoadError
from tl_fastload.ground.compat import __version__

EXIT_ERROR, EXIT_NOT_UNDERSTOOD, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
_PASSED_ON = ("Exit", "Abort", "ClickException", "UsageError", "BadParameter")


class _Group(TyperGroup):
    """Turns every exception into one readable block and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt, Terminated) as error:
            if any(cls.__name__ in _PASSED_ON for cls in type(error).__mro__):
                raise  # how typer says usage errors and exits
            debug = "--debug" in sys.argv or bool(os.environ.get("TL_FASTLOAD_DEBUG"))
            if debug:
                traceback.print_exc()
            if isinstance(error, (KeyboardInterrupt, Terminated)):
                terminated = isinstance(error, Terminated)
                show_error("Ended" if terminated else "Interrupted", "Nothing is left behind.")
                raise typer.Exit(EXIT_TERMINATED if terminated else EXIT_INTERRUPTED) from None
            if isinstance(error, LeanLoadError):
                show_error("Error", as_options(str(error)))
            else:
                hint = "" if debug else "Run it again with --debug for the traceback."
                show_error(type(error).__name__, str(error), hint)
            is_understood = not isinstance(error, ArgumentError)
            raise typer.Exit(EXIT_ERROR if is_understood else EXIT_NOT_UNDERSTOOD) from None


app = typer.Typer(
    cls=_Group,
    name="tl-fastload",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 all went well, 1 something failed, 2 the command was not understood, "
    "130 Ctrl-C, 143 ended by SIGTERM.",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tl-fastload {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
    debug: Debug = False,
) -> None:
    """Load models into TransformerLens' HookedTransformer or TransformerBridge with one copy of the
    weights in memory.

    [bold]Examples[/]

      tl-fastload plan gpt2-xl --dtype bfloat16

      tl-fastload load gpt2 --prompt "The capital of France is"

      tl-fastload bench --shape llama:d_model=512,n_layers=8

      tl-fastload doctor
    """
    # bitsandbytes warns of an optional kernel; TransformerLens 3 of its successor, at each load.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="HookedTransformer", category=DeprecationWarning)


app.command("plan")(plan)
app.command("load")(load)
app.command("bench")(bench)
app.command("save")(save)
app.add_typer(cache_app, name="cache")
app.command("doctor")(doctor)


def main() -> None:
    """Run the command line."""
    end_on_sigterm()
    app()
