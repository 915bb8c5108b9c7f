"""Where a processed copy can be saved, and what of: odd folders, compiled parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.comparison import lean_model
from tests.support.store_helpers import assert_same, embedded
from tl_fastload import SaveError


def test_the_directory_one_works_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = embedded()
    model.save_lean(".")
    assert Path.cwd() == tmp_path
    assert_same(model, lean_model("."))


@pytest.mark.parametrize("name", ["/", "a\0b"])
def test_what_can_be_no_folder(name: str) -> None:
    with pytest.raises(SaveError, match="can be no copy's folder"):
        embedded().save_lean(name)


def test_a_compiled_block(tmp_path: Path) -> None:
    model = embedded()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    model.save_lean(tmp_path / "copy")
    assert_same(embedded(), lean_model(tmp_path / "copy"))
