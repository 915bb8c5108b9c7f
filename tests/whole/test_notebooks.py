"""Notebooks run with whichever class is installed, and none lacks a picture."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parity
def test_the_quickstart_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (path,) = (path for path in NOTEBOOKS if path.stem == "quickstart")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    # Another process that measures, and its picture, are for a notebook.
    sources = [
        source for source in sources if "subprocess" not in source and "IPython" not in source
    ]
    said, names = io.StringIO(), {"__name__": "quickstart"}
    with contextlib.redirect_stdout(said):
        for source in sources:
            exec(compile(source, "quickstart", "exec"), names)
    # Three heads of the second layer each bring back more than three of the corruption's nats.
    assert "clean 6.5, corrupted -10.2" in said.getvalue()
    assert all(f"L1H{head} put back: -{nats}" in said.getvalue() for head, nats in enumerate("557"))
    same, _, every = said.getvalue().partition(" parameters are bit")[0].split()[-3:]
    assert same == every
    assert "logits are bit for bit the same: True" in said.getvalue()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_names_a_class_only_to_choose_it(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for name in ("LeanHookedTransformer", "LeanTransformerBridge"):
        assert code.count(name) == code.count(f"import {name} as Lean") == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_that_draws_shows_a_picture(path: Path) -> None:
    import nbformat  # not installed in every environment

    from notebooks.execute import without_picture

    notebook: Any = nbformat.read(path, as_version=4)
    assert without_picture(notebook) == []
    for cell in notebook.cells:
        cell.outputs = []
    drawing = without_picture(notebook)
    assert path.stem == "your_own_weights" or drawing
