"""What a call asks for is found out once, whatever way the load goes."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support import adapters
from tests.support.comparison import lean_model
from tests.support.fake_hub import fill_cache, forbid_network
from tl_fastload import plan

ASKED = {
    "keywords": ("face", "sort_keywords"),
    "model": ("huggingface.pretrained", "_files_at"),
    "adapter": ("huggingface.pretrained", "locate_adapter"),
    "config": ("huggingface.config", "read_config_json"),
    "transformers": ("huggingface.config", "AutoConfig.from_pretrained"),
    "checked": ("roads.road", "check_arguments"),
    "copy": ("loading.resolve", "copy_folder"),
    "key": ("copies.cache", "entry_name"),
}
"""What is counted -> the function that finds it out."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each thing was found out."""
    counts: Counter[str] = Counter()

    def count(what: str, module: str, name: str) -> None:
        owner: Any = importlib.import_module(f"tl_fastload.{module}")
        *parts, leaf = name.split(".")
        for part in parts:
            owner = getattr(owner, part)
        real = getattr(owner, leaf)

        def counted(*arguments: Any, **keywords: Any) -> Any:
            counts[what] += 1
            return real(*arguments, **keywords)

        monkeypatch.setattr(owner, leaf, counted)

    for what, (module, name) in ASKED.items():
        count(what, module, name)
    # Whoever imports the reader asks it as well.
    pretrained: Any = importlib.import_module("tl_fastload.huggingface.pretrained")
    config: Any = importlib.import_module("tl_fastload.huggingface.config")
    monkeypatch.setattr(pretrained, "read_config_json", config.read_config_json)
    return counts


ALWAYS = {"keywords": 1, "model": 1, "checked": 1, "copy": 1}


def test_a_folder(asked: Counter[str], zoo: Any) -> None:
    lean_model(zoo("llama-gqa"))
    assert asked == {**ALWAYS, "config": 1}


def test_a_hub_name(
    asked: Counter[str], zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_network(monkeypatch)
    files = {path.name: path.read_bytes() for path in zoo("llama-gqa").iterdir() if path.is_file()}
    fill_cache(tmp_path, "org/model", files)
    lean_model("org/model", cache_dir=tmp_path)
    assert asked == {**ALWAYS, "config": 1}


def test_a_cache(asked: Counter[str], zoo: Any, tmp_path: Path) -> None:
    lean_model(zoo("llama-gqa"), cache=tmp_path)
    assert asked == {**ALWAYS, "config": 1, "key": 1}
    asked.clear()
    assert lean_model(zoo("llama-gqa"), cache=tmp_path).load_report.cache.startswith("hit")
    assert asked == {**ALWAYS, "key": 1}


def test_an_adapter_and_a_cache(asked: Counter[str], zoo: Any, tmp_path: Path) -> None:
    adapter = adapters.for_case("llama-gqa", zoo("llama-gqa"), tmp_path / "adapter")
    asked.clear()
    for reads in ({"config": 1}, {}):
        lean_model(zoo("llama-gqa"), cache=tmp_path / "cache", adapter=adapter)
        assert asked == {**ALWAYS, "adapter": 1, "key": 1, **reads}
        asked.clear()


def test_a_plan(asked: Counter[str], zoo: Any, tmp_path: Path) -> None:
    plan(zoo("llama-gqa"), device="cpu")
    assert asked == {**ALWAYS, "config": 1}
    asked.clear()
    plan(zoo("llama-gqa"), device="cpu", cache=tmp_path)
    assert asked == {**ALWAYS, "config": 1, "key": 1}
