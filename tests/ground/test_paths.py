"""Texts that are no paths: each public way in says so, in errors of the family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import tl_fastload
from tl_fastload.copies.cache import folder_for
from tl_fastload.copies.read import copy_folder
from tl_fastload.copies.write import write_copy
from tl_fastload.errors import ArgumentError, CheckpointError, SaveError, UnknownModelError
from tl_fastload.ground.paths import exists, expanded, is_directory
from tl_fastload.huggingface.lora.adapter import locate_adapter
from tl_fastload.loading.sources import open_source
from tl_fastload.request.keywords import Keywords
from tl_fastload.source.reader import FileReader

NOBODY = "~nobody-of-this-name/x"
NO_PATHS = (NOBODY, "x" * 5000, "a\0b")


@pytest.mark.parametrize("name", NO_PATHS, ids=["home", "long", "null"])
@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda name: locate_adapter(name, {"local_files_only": True}), UnknownModelError),
        (lambda name: open_source(name, FileReader()), ArgumentError),
        (tl_fastload.verify_copy, CheckpointError),
    ],
    ids=["adapter", "weights", "copy"],
)
def test_what_is_no_path_is_not_there(ask: Callable[[str], Any], error: Any, name: str) -> None:
    assert not exists(expanded(name))
    assert not is_directory(expanded(name))
    assert copy_folder(name, Keywords()) is None
    with pytest.raises(error) as caught:
        ask(name)
    assert type(caught.value).__module__ == "tl_fastload.errors"


def test_nothing_is_written_into_the_home_of_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model: Any = nn.Module()
    model.cfg = SimpleNamespace()
    with pytest.raises(SaveError, match="nobody-of-this-name/x: nobody of that name has a home"):
        write_copy(model, Path(NOBODY))
    with pytest.raises(ArgumentError, match="nobody of that name has a home"):
        folder_for(NOBODY)
    assert list(tmp_path.iterdir()) == []
