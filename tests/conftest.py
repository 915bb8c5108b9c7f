"""Fixtures that every test module shares."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before huggingface_hub is imported, which reads it once: no test may touch the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import zoo as zoo_module
from fake_hub import forbid_network

from tl_fastload.reader import FileReader

Zoo = Callable[..., Path]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """`zoo(case_id, **options of zoo.build)` -> folder; each one is written once in a session.

    Treat the folders as read-only, or copy them first. `tokenizer=True` adds a word-level one.
    """
    root = tmp_path_factory.mktemp("zoo")
    built: dict[str, Path] = {}

    def get(case_id: str, *, tokenizer: bool = False, **options: Any) -> Path:
        case = zoo_module.CASES[case_id]
        if reason := case.unavailable():
            pytest.skip(reason)
        key = repr((case_id, tokenizer, sorted(options.items(), key=str)))
        if key not in built:
            # The last part is the repository's name, which the old .pth models are known by.
            folder = root / str(len(built)) / case.repo.rpartition("/")[2]
            zoo_module.build(case_id, folder, **options)
            if tokenizer:
                zoo_module.add_tokenizer(folder, case.d_vocab)
            built[key] = folder
        return built[key]

    return get


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error must come before weights are read."""

    def read(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(FileReader, "read", read)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    forbid_network(monkeypatch)
    return tmp_path / "cache"
