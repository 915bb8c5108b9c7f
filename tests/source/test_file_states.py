"""Files that change while they are loaded: one error that says so, never a mixture."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tl_fastload import CheckpointError, LeanHookedTransformer, LeanLoadError, load_weights_
from tl_fastload.source.file_states import FileState, OpenFiles
from tl_fastload.source.reader import FileMaps
from tl_fastload.source.safetensors import read_header


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def write_over(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)  # of the same size, and as old
    other.replace(path)


CHANGES = (cut, write_over, replace, Path.unlink)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_is_compared_when_it_is_opened_and_at_the_end(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"x": torch.arange(100.0)}, path)
    entry, files = read_header(path)["x"], OpenFiles()
    files.expect({path: FileState.of(path)})
    files.check_all()
    change(path)
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        files.check_all()
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        FileMaps().view(entry, torch.empty(100, device="meta"))
    files.close()


def test_what_is_open_may_lose_its_name(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"x": torch.arange(100.0)}, path)
    entry, files = read_header(path)["x"], OpenFiles()
    files.descriptor(path)
    save_file({"x": torch.zeros(100)}, tmp_path / "new")
    (tmp_path / "new").replace(path)
    geometry = torch.empty(100, device="meta")
    assert torch.equal(FileMaps(files).view(entry, geometry), torch.arange(100.0))
    files.check_all()
    files.close()


def test_many_files_need_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / str(number) for number in range(4)]
    files, opened, really_open = OpenFiles(), [0], os.open
    for path in paths:
        path.write_bytes(b"x")

    def open_two(*arguments: Any) -> int:
        opened[0] += 1
        if opened[0] % 3 == 0:
            raise OSError(24, "Too many open files")
        return really_open(*arguments)

    monkeypatch.setattr(os, "open", open_two)
    for path in paths:
        os.fstat(files.descriptor(path))
    files.check_all()
    files.close()

    def refuse(*_: Any) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match="ulimit -n"):
        files.descriptor(paths[0])


def test_each_file_is_closed_if_closing_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(b"x")
    files = OpenFiles()
    left = [files.descriptor(path) for path in paths]

    def close(descriptor: int) -> None:
        left.remove(descriptor)
        really_close(descriptor)
        raise OSError("Input/output error")

    really_close = os.close
    monkeypatch.setattr(os, "close", close)
    with pytest.raises(OSError, match="Input/output"):
        files.close()
    assert left == []
    files.close()  # which would close descriptors of others by now


def load_while(folder: Path, change: Callable[[], None], **options: Any) -> Any:
    """Load, and let something happen at the first parameter that is placed."""
    calls: list[Any] = []

    def progress(event: Any) -> None:
        if not calls:
            change()
        calls.append(event)

    load = LeanHookedTransformer.from_pretrained_lean
    return load(str(folder), device="cpu", progress=progress, **options)


@pytest.mark.parametrize("kind", ["whole", "shards", "torch"])
def test_a_checkpoint_that_is_saved_again_while_it_loads(
    zoo: Any, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(zoo("llama-gqa"), folder)
    state = load_file(folder / "model.safetensors")
    wanted = LeanHookedTransformer.from_pretrained_lean(str(folder), device="cpu").state_dict()
    names = sorted(state)
    (folder / "model.safetensors").unlink()

    def save(factor: float) -> None:
        scaled = {name: tensor * factor for name, tensor in state.items()}
        if kind == "torch":
            torch.save(scaled, folder / "new")
            (folder / "new").replace(folder / "pytorch_model.bin")
            return
        parts = [names] if kind == "whole" else [names[::2], names[1::2]]
        for number, part in enumerate(parts):
            save_file({name: scaled[name] for name in part}, folder / "new")
            (folder / "new").replace(folder / f"model-{number}.safetensors")

    save(1.0)
    if kind == "shards":
        homes = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(names)}
        index = {"metadata": {}, "weight_map": homes}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if kind == "shards":  # the second one is opened later
        with pytest.raises(CheckpointError, match="changed while it was being loaded"):
            load_while(folder, lambda: save(2.0))
        return
    found = load_while(folder, lambda: save(2.0)).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_other_files_of_a_load_are_watched_too(zoo: Any, tmp_path: Path) -> None:
    folder, copy = tmp_path / "m", tmp_path / "copy"
    shutil.copytree(zoo("llama-gqa"), folder)
    model = LeanHookedTransformer.from_pretrained_lean(str(folder), device="cpu")
    with pytest.raises(CheckpointError, match=r"config\.json changed while"):
        load_while(folder, lambda: replace(folder / "config.json"))
    model.save_lean(copy)
    weights = next(copy.glob("*.safetensors"))
    with pytest.raises(LeanLoadError, match=r"safetensors"):
        load_while(copy, lambda: write_over(weights), mmap=False)

    def progress(_: Any) -> None:
        write_over(folder / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"changed while"):
        load_weights_(model, folder, progress=progress)
