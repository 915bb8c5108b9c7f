"""`tl-fastload cache`: list, shrink and empty the cache of processed copies."""

from __future__ import annotations

import datetime
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tl_fastload.cli.console import console, give
from tl_fastload.cli.options import Written, command
from tl_fastload.ground.words import format_bytes

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B?)", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}

Folder = Annotated[Path | None, typer.Option(help="Another cache folder than the usual one.")]

cache_app = typer.Typer(
    name="cache",
    no_args_is_help=True,
    help="List, shrink and empty the cache of processed copies.",
)


@cache_app.command("list")
@command
def list_entries(folder: Folder = None, json: Written = None) -> None:
    """List the copies, the one used last first.

    [bold]Examples[/]

      tl-fastload cache list

      tl-fastload cache list --json -

    Args:
        json: Write the list as JSON; - for standard output.
    """
    from tl_fastload import cache

    entries = cache.entries(folder)
    found = {
        "folder": str(folder or cache.default_folder()),
        "size_bytes": cache.size_bytes(folder),
        "entries": [{**asdict(entry), "folder": str(entry.folder)} for entry in entries],
    }
    give(json, lambda: found, lambda: _show(entries, found))


def _show(entries: list[Any], found: dict[str, Any]) -> None:
    table = Table()
    for column in ("source", "dtype", "quantized", "size", "last used", "folder"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        used = datetime.datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
        table.add_row(
            Text(f"{entry.source}{f'@{entry.revision[:8]}' if entry.revision else ''}"),
            entry.dtype,
            entry.quantization or "-",
            format_bytes(entry.size_bytes),
            used,
            entry.folder.name,
        )
    if entries:
        console().print(table)
    total = format_bytes(found["size_bytes"])
    console().print(Text(f"{len(entries)} copies, {total}, in {found['folder']}"))


@cache_app.command("prune")
@command
def prune(
    max_size: Annotated[str | None, typer.Option(metavar="SIZE")] = None,
    unused_days: Annotated[float | None, typer.Option(min=0)] = None,
    folder: Folder = None,
) -> None:
    """Remove damaged copies, what ended processes left, and as many others as asked for.

    [bold]Examples[/]

      tl-fastload cache prune --max-size 20G

      tl-fastload cache prune --unused-days 30

    Args:
        max_size: Keep those used last, up to this size: 20G, 500M ...
        unused_days: Remove those not used for so many days.
    """
    max_bytes = None if max_size is None else _size_bytes(max_size)
    from tl_fastload import cache

    removed = cache.prune(folder, max_bytes=max_bytes, unused_days=unused_days)
    _say_removed(len(removed), cache.size_bytes(folder))


@cache_app.command("clear")
@command
def clear(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    folder: Folder = None,
) -> None:
    """Remove every copy. Models that are mapped from one go on working.

    [bold]Examples[/]

      tl-fastload cache clear

      tl-fastload cache clear --yes --folder ./copies
    """
    from tl_fastload import cache

    size = format_bytes(cache.size_bytes(folder))
    if not yes:
        typer.confirm(
            f"Remove all copies ({size}) in {folder or cache.default_folder()}?", abort=True
        )
    removed = cache.clear(folder)
    _say_removed(len(removed), cache.size_bytes(folder))


def _say_removed(count: int, left_bytes: int) -> None:
    console().print(Text(f"Removed {count} copies; {format_bytes(left_bytes)} left."))


def _size_bytes(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(
            f"{text!r} is no size: write 20G, 500M or a number of bytes.", param_hint="'--max-size'"
        )
    return int(float(match[1]) * 1024 ** _POWERS[match[2].upper()])
