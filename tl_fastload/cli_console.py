"""What the commands print: results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tl_fastload.errors import ArgumentError

_PIPE_WIDTH = 120


class Rows(Protocol):
    """A report or a plan."""

    def rows(self) -> list[tuple[str, str]]: ...


def console(*, stderr: bool = False) -> Console:
    """A console on the present standard output or error; a pipe has a width of its own."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


def libraries_to_stderr() -> AbstractContextManager[Any]:
    """TransformerLens prints to standard output, which is for results."""
    return contextlib.redirect_stdout(sys.stderr)


def show_rows(found: Rows) -> None:
    """A report or a plan, long texts below their start on a terminal, as whole lines in a pipe."""
    out = console()
    if not out.is_terminal:
        sys.stdout.write(f"{found}\n")
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in found.rows():
        table.add_row(Text(f"  {label}"), Text(text))
    out.print(type(found).__name__)
    out.print(table)


def say(text: str) -> None:
    """A line about what goes on."""
    console(stderr=True).print(Text(text))


def show_error(title: str, text: str, hint: str = "") -> None:
    """One block that says what is wrong."""
    body = Text(text if not hint else f"{text}\n\n{hint}")
    console(stderr=True).print(Panel(body, title=title, title_align="left", border_style="red"))


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write JSON to a file, whole or not at all, or to standard output for "-"."""
    text = json.dumps(values, indent=1) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be written ({error.strerror}).") from error
    finally:
        partial.unlink(missing_ok=True)
