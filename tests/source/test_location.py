"""What counts as a name and as a model's folder, and what is said about the rest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_hub import resolve
from tests.support.folders import STATE, folder_with
from tl_fastload.errors import ArgumentError, CheckpointError, UnknownModelError
from tl_fastload.hooked.official_names import resolve_model
from tl_fastload.source.checkpoint import open_weights


def refusal(folder: Path | str, **arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve(folder, **arguments)
    return str(caught.value)


@pytest.mark.parametrize("name", [None, "", 3, b"gpt2"])
def test_what_is_no_name_at_all(name: Any) -> None:
    with pytest.raises(ArgumentError, match=re.escape(repr(name))):
        resolve(name)


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./nope", "../nope", "~/nope", "~nobody-here/m", r"C:\m", "m/x/"]
)
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModelError, match="There is no folder") as caught:
        resolve(name)
    assert Path(name).name in str(caught.value)
    with pytest.raises(UnknownModelError, match=r"There is no folder .*gpt2"):
        resolve(Path("gpt2"))


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    path = folder_with(tmp_path, {"model.safetensors": STATE}) / "model.safetensors"
    with pytest.raises(UnknownModelError, match=r"model\.safetensors is a file\. Pass its folder"):
        resolve(path)


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ({"model.safetensors": STATE}, "save_pretrained"),
        ({"adapter_config.json": {}}, "adapter (LoRA)"),
        ({"m.gguf": b"GGUF", "n.gguf": b"GGUF"}, "gguf_file= with one of m.gguf, n.gguf"),
        ({"checkpoint-50/config.json": {}}, "checkpoint-50"),
    ],
)
def test_a_folder_without_config(tmp_path: Path, files: dict[str, Any], hint: str) -> None:
    folder = folder_with(tmp_path / "m", files)
    (folder / "config.json").unlink()
    message = refusal(folder)
    assert f"{folder} has no config.json" in message
    assert hint in message


def test_a_folder_that_hides_an_official_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpt2-small").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "It hides the model gpt2 of the same name: rename" in refusal("gpt2-small")


def test_an_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path / "m", {})

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert re.search(rf"{folder}: Permission denied.*chmod", refusal(folder))


def test_the_configuration_comes_first_and_alone(tmp_path: Path) -> None:
    location = resolve_model(folder_with(tmp_path / "m", {}))
    assert location.folder == tmp_path / "m"
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_weights(location)


def test_subfolder_home_and_ignored_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_with(tmp_path / "m" / "inner", {"model.safetensors": STATE})
    monkeypatch.setenv("HOME", str(tmp_path))
    checkpoint = resolve("~/m", subfolder="inner", revision="v1")
    assert checkpoint.folder == tmp_path / "m" / "inner"
    assert "revision='v1' was ignored" in checkpoint.notes[0]
    with pytest.raises(ArgumentError, match="subfolder"):
        resolve("~/m", subfolder="../m/inner")
    with pytest.raises(UnknownModelError, match="has no folder 'nowhere'"):
        resolve("~/m", subfolder="nowhere")
