"""Processed copies that another process saves again or removes while they are being loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.comparison import lean_model
from tests.support.store_helpers import assert_same, embedded
from tl_fastload import CheckpointError, cache, save_lean, verify_copy
from tl_fastload.copies import read


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """`meanwhile(action)` does it once, when the next load of a copy has read its JSON."""

    def arrange(action: Callable[[], Any]) -> None:
        actions = [action]
        build = read._build

        def disturbed(*arguments: Any) -> Any:
            if actions:
                actions.pop()()
            return build(*arguments)

        monkeypatch.setattr(read, "_build", disturbed)

    return arrange


def test_a_copy_that_is_saved_again(tmp_path: Path, meanwhile: Any) -> None:
    model = embedded()
    save_lean(model, tmp_path / "copy")
    meanwhile(lambda: save_lean(model, tmp_path / "copy"))
    loaded = lean_model(tmp_path / "copy")
    assert_same(model, loaded)
    assert loaded.tokenizer is not None


def test_a_copy_that_is_removed(tmp_path: Path, meanwhile: Any) -> None:
    model = embedded()
    save_lean(model, tmp_path / "copy")
    meanwhile(lambda: shutil.rmtree(tmp_path / "copy"))
    with pytest.raises(CheckpointError, match="copy"):
        lean_model(tmp_path / "copy")


def test_weights_that_are_removed(tmp_path: Path, meanwhile: Any) -> None:
    model = embedded()
    save_lean(model, tmp_path / "copy")
    weights = next((tmp_path / "copy").glob("weights-*"))
    meanwhile(weights.unlink)
    with pytest.raises(CheckpointError, match=r"could not be read to its end|No such file"):
        lean_model(tmp_path / "copy")


def test_a_cache_that_is_cleared(tmp_path: Path, meanwhile: Any) -> None:
    embedded(cache=tmp_path)
    meanwhile(lambda: cache.clear(tmp_path))
    model = embedded(cache=tmp_path)
    assert model.load_report.cache.startswith("filled")
    assert_same(model, embedded())


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_a_damaged_tokenizer(damage: str, tmp_path: Path) -> None:
    """Two tokens that change places would give other ids, and no error."""
    model = embedded(cache=tmp_path)
    entry = cache.entries(tmp_path)[0].folder
    file = next(entry.glob("tokenizer-*/tokenizer.json"))
    text = file.read_text()
    file.unlink()
    if damage == "altered":
        file.write_text(text.replace('"version"', '"Version"', 1))
    for refuse in (verify_copy, lean_model):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            refuse(entry)
    other = lean_model(entry, tokenizer=model.tokenizer)
    assert_same(model, other)
    assert embedded(cache=tmp_path).load_report.cache.startswith("filled")
