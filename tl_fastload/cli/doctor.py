"""`tl-fastload doctor`: what of this machine matters for loading, and what to fix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from rich.text import Text

from tl_fastload.cli.console import console, write_json
from tl_fastload.cli.options import Debug, json_option
from tl_fastload.ground.words import format_bytes

if TYPE_CHECKING:
    from tl_fastload.cli.diagnosis import Diagnosis


def doctor_command(
    json: Annotated[Path | None, json_option("the facts")] = None,
    debug: Debug = False,
) -> None:
    """Show versions, devices, kernels, caches and memory limits, and what to fix.

    Multiplies by a small matrix of each quantized format, so that "works" means that it does.

    [bold]Examples[/]

      tl-fastload doctor

      tl-fastload doctor --json facts.json
    """
    from tl_fastload.cli.diagnosis import diagnose

    found = diagnose()
    if json is not None:
        write_json(found.to_dict(), json)
    if str(json) != "-":
        _show(found)


def _show(found: Diagnosis) -> None:
    out = console()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, text in _rows(found):
        table.add_row(label, Text(text))
    out.print(table)
    out.print()
    if not found.fixes:
        out.print("[green]Nothing to fix.[/]")
        return
    out.print("[bold]To fix[/]")
    for fix in found.fixes:
        out.print(Text(f"- {fix}"))


def _rows(found: Diagnosis) -> list[tuple[str, str]]:
    rows = [(name, version or "not installed") for name, version in found.versions.items()]
    rows.append(("strategy", found.strategy))
    rows += [(name, str(value)) for name, value in found.machine.items() if name != "memory_bytes"]
    for device in found.devices:
        free = "unknown" if device.available_bytes is None else format_bytes(device.available_bytes)
        room = f"{free} of {format_bytes(device.total_bytes)} can be had"
        rows.append((device.name, f"{device.description}; {room}"))
    for kernel in found.kernels:
        state = "works" if kernel.problem is None else f"does NOT work: {kernel.problem}"
        rows.append((f"{kernel.kind} on {kernel.device}", state))
    for cache in found.caches:
        way = "mapped" if cache.is_mapped else "read, not mapped"
        rows.append(
            (
                cache.name,
                f"{cache.folder} on {cache.file_system or 'an unknown file system'}, {way}; "
                f"{format_bytes(cache.free_bytes)} free",
            )
        )
    return rows
