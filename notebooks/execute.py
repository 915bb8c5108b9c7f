"""Runs the notebooks from top to bottom, each in a fresh kernel, and writes their outputs back.

`python -m notebooks.execute` rewrites the notebooks; `--check` only runs them, as CI does.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tl_fastload.cli.console import end_on_sigterm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
_DRAWS = re.compile(r"\.plot\(|\bplot_\w+\(|\bsubplots\(|\bImage\(")
CELL_LIMIT_SECONDS = 600  # a hanging cell, not a slow machine


def main() -> None:
    """Execute every notebook, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="file names; all of them by default")
    parser.add_argument("--check", action="store_true", help="leave the files as they are")
    arguments = parser.parse_args()
    names = arguments.names or [path.name for path in sorted(HERE.glob("*.ipynb"))]
    failed = [name for name in names if not _execute(HERE / name, write=not arguments.check)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def _execute(path: Path, write: bool) -> bool:
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        # The notebooks import the package and write files: neither may touch the user's folders.
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {
            **os.environ,
            "PYTHONPATH": paths,
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
            "TL_FASTLOAD_CACHE": "",
            "TMPDIR": scratch,
        }
        resources = {"metadata": {"path": scratch}}
        client = NotebookClient(notebook, timeout=CELL_LIMIT_SECONDS, resources=resources)
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            print(f"{path.name}: {error}", flush=True)
            return False
        missing = without_picture(notebook)
        if missing:
            print(f"{path.name}: no picture below {missing[0]!r}", flush=True)
            return False
        for text, holder, key in _texts(notebook):
            holder[key] = text.replace(scratch, "scratch").replace(f"{ROOT}{os.sep}", "")
    seconds = time.perf_counter() - started
    print(f"{path.name}: {seconds:.0f} s", flush=True)
    if write:
        _make_repeatable(notebook)
        partial = path.with_suffix(".partial")
        nbformat.write(notebook, partial)
        partial.replace(path)
    return True


def without_picture(notebook: Any) -> list[str]:
    """The last lines of the cells that draw and show nothing.

    Args:
        notebook: as nbformat reads it, with outputs.
    """
    found = []
    for cell in notebook.cells:
        shown = [kind for output in cell.get("outputs", []) for kind in output.get("data", {})]
        if cell.cell_type == "code" and _DRAWS.search(cell.source) and "image/png" not in shown:
            found.append(cell.source.splitlines()[-1])
    return found


def _texts(notebook: Any) -> Iterator[tuple[str, Any, str]]:
    """Every output text with where it stands, so that this machine's folders can be taken out."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "text" in output:
                yield output["text"], output, "text"
            for kind, text in output.get("data", {}).items():
                if isinstance(text, str) and kind.startswith("text/"):
                    yield text, output["data"], kind


def _make_repeatable(notebook: Any) -> None:
    """Leave out what differs from run to run and tells a reader nothing."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not _is_chatter(output)]
        cell["id"] = f"cell-{number:02d}"
        cell.metadata = {}


def _is_chatter(output: Any) -> bool:
    """Log lines of libraries, and the empty boxes that finished progress bars leave."""
    if output.output_type == "stream":
        return bool(output.name == "stderr" or not output.text.strip())
    texts = [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return output.output_type == "display_data" and not any(map(str.strip, texts))


if __name__ == "__main__":
    end_on_sigterm()
    main()
