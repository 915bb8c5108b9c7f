"""What the commands print: results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from tl_fastload.errors import ArgumentError

_PIPE_WIDTH = 120


def console(*, stderr: bool = False) -> Console:
    """A console on the present standard output or error; a pipe has a width of its own."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


def libraries_to_stderr() -> AbstractContextManager[Any]:
    """TransformerLens prints to standard output, which is for results."""
    return contextlib.redirect_stdout(sys.stderr)


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
