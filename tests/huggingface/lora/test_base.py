"""An adapter that names a base model: refused where that is known to be another model, noted where
nobody can know.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import adapters, reference
from tests.support import zoo as zoo_module
from tests.support.fake_hub import fill_cache
from tl_fastload import AdapterError, LeanHookedTransformer, plan
from tl_fastload.source.reader import FileReader


@pytest.fixture
def base(zoo: Any) -> Path:
    folder: Path = zoo("llama-gqa")
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return adapters.for_case("llama-gqa", base, tmp_path / "adapter", target_modules=["q_proj"])


def renamed(adapter: Path, base: str | Path | None) -> Path:
    """The adapter, with another base model in its configuration."""
    file = adapter / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "base_model_name_or_path": base and str(base)}))
    return adapter


def base_notes(model: Any) -> list[str]:
    return [note for note in model.load_report.notes if "base model" in note]


@pytest.fixture
def other(base: Path, tmp_path: Path) -> Path:
    """A model of the same shapes with other weights."""
    folder = shutil.copytree(base, tmp_path / "other")
    weights = zoo_module.read_weights(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    adapters.save_file(
        {name: torch.randn_like(weight) for name, weight in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def test_another_folder_with_other_weights(
    other: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(FileReader, "read", lambda self, *a: reads.append(a))
        with pytest.raises(AdapterError) as caught:
            adapters.lean(other, adapter)
    assert not reads
    for part in (str(adapter), f"was trained on {base}", f"this is {other}", "check_base=False"):
        assert part in str(caught.value)
    with pytest.raises(AdapterError, match="was trained on"):
        plan(other, adapter=adapter)
    model = adapters.lean(other, adapter, check_base=False)
    assert f"names {base} as its base model" in base_notes(model)[0]


def test_a_copy_of_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(base, tmp_path / "elsewhere")
    model = adapters.lean(elsewhere, adapter)
    assert f"names {base} as its base model" in base_notes(model)[0]
    assert not base_notes(adapters.lean(base, adapter))


@pytest.mark.parametrize("name", ["someone/other", "/gone/other", "C:\\models\\other"])
def test_a_folder_and_a_base_that_is_not_here(base: Path, adapter: Path, name: str) -> None:
    assert name in base_notes(adapters.lean(base, renamed(adapter, name)))[0]


def test_the_base_in_another_dtype(base: Path, adapter: Path, tmp_path: Path) -> None:
    narrow = shutil.copytree(base, tmp_path / "narrow")
    weights = zoo_module.read_weights(base)
    adapters.save_file(
        {name: weight.half() for name, weight in weights.items()}, narrow / "model.safetensors"
    )
    assert f"names {base} as its base model" in base_notes(adapters.lean(narrow, adapter))[0]


def test_a_base_without_a_name(base: Path, adapter: Path) -> None:
    assert not base_notes(adapters.lean(base, renamed(adapter, None)))


@pytest.mark.parametrize(
    ("named", "fits"),
    [
        ("org/llama-some", True),
        ("mirror/Meta-Llama-Some", True),
        ("llama-some@main", True),
        ("unsloth/llama-some-unsloth-bnb-4bit", True),
        ("/models/llama-some/", True),
        ("/cache/models--org--llama-some/snapshots/0123abc", True),
        ("org/llama-some-instruct", False),
        ("gpt2", False),
    ],
)
def test_names_on_the_hub(
    base: Path, adapter: Path, tmp_path: Path, named: str, fits: bool
) -> None:
    cache = tmp_path / "cache"
    fill_cache(cache, "org/llama-some", {path.name: path.read_bytes() for path in base.iterdir()})
    arguments = {"cache_dir": cache, "local_files_only": True}
    renamed(adapter, named)
    if fits:
        assert not base_notes(adapters.lean("org/llama-some", adapter, **arguments))
        return
    with pytest.raises(AdapterError, match=f"trained on {named}, and this is org/llama-some"):
        adapters.lean("org/llama-some", adapter, **arguments)


def test_a_model_in_memory(base: Path, other: Path, adapter: Path) -> None:
    def load(folder: Path, **arguments: Any) -> Any:
        return LeanHookedTransformer.from_pretrained_lean(
            "gpt2",  # a name alone says nothing about weights that are passed
            hf_model=reference.hf_model("llama-gqa", folder),
            adapter=adapter,
            progress=False,
            **arguments,
        )

    assert not base_notes(load(base))
    with pytest.raises(AdapterError, match=f"this is {other}"):
        load(other)
    assert base_notes(load(other, check_base=False))


def test_a_cached_sum_is_no_way_around(other: Path, adapter: Path, tmp_path: Path) -> None:
    arguments = {"adapter": adapter, "cache": tmp_path / "cache", "device": "cpu"}
    load = LeanHookedTransformer.from_pretrained_lean
    load(other, **arguments, check_base=False, progress=False)
    with pytest.raises(AdapterError, match="trained on"):
        load(other, **arguments, progress=False)
