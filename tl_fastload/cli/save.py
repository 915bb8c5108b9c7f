"""`tl-fastload save`: load a model and write it as a processed copy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tl_fastload.cli.console import console, libraries_to_stderr
from tl_fastload.cli.options import Model, command, lean_class
from tl_fastload.ground.words import format_bytes


@command
def save(
    model: Model, folder: Annotated[Path, typer.Argument()], arguments: dict[str, Any]
) -> None:
    """Load a model and save it, processed and quantized as asked, for loading in an instant.

    The copy is written whole or not at all.

    [bold]Examples[/]

      tl-fastload save gpt2-xl ./gpt2-xl-processed --dtype bfloat16

      tl-fastload save ./my-model ./my-model-nf4 --quantize nf4

      tl-fastload load ./gpt2-xl-processed

    Args:
        folder: Where to write the copy; a new or empty folder.
    """
    from tl_fastload.copies.write import check_target

    check_target(folder)
    with libraries_to_stderr():
        loaded = lean_class(model, arguments).from_pretrained_lean(model, **arguments)
        written = loaded.save_lean(folder)
    size_bytes = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    console().print(Text(f"Saved {loaded.load_report.source} in {written}"))
    console().print(Text(f"{format_bytes(size_bytes)}; load it with: tl-fastload load {written}"))
