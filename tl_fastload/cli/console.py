"""What the commands print: results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from tl_fastload.cli.options import as_options
from tl_fastload.ground.paths import write_whole
from tl_fastload.ground.words import one_line
from tl_fastload.printable import printable

_PIPE_WIDTH = 120


class Terminated(SystemExit):
    """SIGTERM: unwinds like Ctrl-C, so that processes and folders are cleaned up."""


def end_on_sigterm() -> None:
    """Have SIGTERM unwind the main thread and end the process with 143, as a shell has it."""

    def end(number: int, frame: Any) -> None:
        raise Terminated(128 + number)

    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, end)


class _Printable(Console):
    """A console that writes control characters out, wherever they come from."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def console(*, stderr: bool = False) -> Console:
    """A console on the present standard output or error; a pipe has a width of its own."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return _Printable(stderr=stderr, width=width, highlight=False)


def libraries_to_stderr() -> AbstractContextManager[Any]:
    """TransformerLens prints to standard output, which is for results."""
    return contextlib.redirect_stdout(sys.stderr)


def show_rows(found: Any) -> None:
    """A report or a plan, long texts below their start on a terminal, as whole lines in a pipe."""
    out = console()
    if not out.is_terminal:
        sys.stdout.write(f"{as_options(str(found))}\n")
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in found.rows():
        table.add_row(Text(f"  {one_line(label)}"), Text(as_options(one_line(text))))
    out.print(type(found).__name__)
    out.print(table)


def say(text: str) -> None:
    """A line about what goes on."""
    console(stderr=True).print(Text(printable(text)))


def show_error(title: str, text: str, hint: str = "") -> None:
    """One block that says what is wrong."""
    text = printable(text)
    body = Text(text if not hint else f"{text}\n\n{hint}")
    console(stderr=True).print(Panel(body, title=title, title_align="left", border_style="red"))


def give(json: Path | None, values: Callable[[], dict[str, Any]], show: Callable[[], None]) -> None:
    """Show results, and write them as JSON if that was asked for.

    Args:
        json: the file; "-" for standard output, where nothing else is shown then.
        values: gives what is written.
        show: prints for people.
    """
    if str(json) != "-":
        show()
    if json is not None:
        write_json(values(), json)


def draw(path: Path | None, plot: Callable[..., Any]) -> None:
    """Draw into a file, if one was named."""
    if path is not None:
        plot(path=path)
        say(f"Written: {path}")


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write JSON to a file, whole or not at all, or to standard output for "-"."""
    text = json.dumps(values, indent=1) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        write_whole(path, lambda file: file.write(text.encode()))
