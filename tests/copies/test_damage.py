"""Processed copies that are damaged, and places that cannot hold one: always an error."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.comparison import lean_model
from tests.support.store_helpers import embedded, only_file, rewritten
from tl_fastload import LeanHookedTransformer, save_lean, verify_copy
from tl_fastload.copies import manifest as store_format
from tl_fastload.copies import write
from tl_fastload.copies.manifest import MANIFEST, read_manifest
from tl_fastload.errors import CheckpointError, SaveError


@pytest.mark.parametrize("change", [-1, -100_000, 1], ids=["byte less", "cut off", "byte more"])
def test_another_size_is_found_always(change: int, tmp_path: Path) -> None:
    embedded().save_lean(tmp_path / "copy")
    path = only_file(tmp_path / "copy")
    os.truncate(path, path.stat().st_size + change)
    with pytest.raises(CheckpointError, match=rf"{path.name} has .* bytes, .* were written"):
        lean_model(tmp_path / "copy")


def test_altered_bytes_are_found_on_demand(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    embedded().save_lean(folder)
    name = read_manifest(folder).parameters["blocks.1.attn.W_O"].tensors[""]
    data = bytearray(only_file(folder).read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    data[8 + length + begin + 5] ^= 1
    only_file(folder).write_bytes(data)
    lean_model(folder)
    for act in (lambda: verify_copy(folder), lambda: lean_model(folder, verify=True)):
        with pytest.raises(CheckpointError, match=r"bytes of blocks\.1\.attn\.W_O"):
            act()


def test_altered_descriptions_are_found_always(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    embedded().save_lean(folder)
    other = tmp_path / "other"
    embedded().save_lean(other)
    path, text = folder / MANIFEST, (folder / MANIFEST).read_text()
    mine = only_file(folder).read_bytes()
    only_file(folder).write_bytes(only_file(other).read_bytes())
    with pytest.raises(CheckpointError, match="is not the file that"):
        lean_model(folder)
    only_file(folder).write_bytes(mine)
    for changed_text, words in [
        (text.replace('"act_fn": "', '"act_fn": "x'), "was altered"),
        (text[:-40], "not valid JSON"),
        ("[]", "not a JSON object"),
        (text.replace('"format_version": 1', '"format_version": 99'), "format version 99"),
    ]:
        path.write_text(changed_text)
        with pytest.raises(CheckpointError, match=words):
            lean_model(folder)
    path.write_text(text)
    only_file(folder).unlink()
    with pytest.raises(CheckpointError, match="Cannot read"):
        lean_model(folder)


def test_another_class_or_version_is_named(tmp_path: Path) -> None:
    class Wider(LeanHookedTransformer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.extra = nn.Parameter(torch.ones(3))

    model = embedded()
    model.save_lean(tmp_path / "copy")
    with pytest.raises(CheckpointError, match="missing in the copy: extra"):
        Wider.from_pretrained_lean(tmp_path / "copy", device="cpu")
    model.cfg.field_of_mine = [1, 2]
    model.save_lean(tmp_path / "copy")
    assert lean_model(tmp_path / "copy").cfg.field_of_mine == [1, 2]
    model.cfg.field_of_mine = object()
    with pytest.raises(SaveError, match=r"cfg\.field_of_mine is a object"):
        model.save_lean(tmp_path / "copy")


def test_another_models_json_beside_the_weights(tmp_path: Path) -> None:
    """With a checksum that fits: the weight files say which model they belong to."""
    folder = embedded().save_lean(tmp_path / "copy")
    path = folder / MANIFEST
    body = json.loads(path.read_text())
    del body["checksum"]
    body["configuration"]["attn_scale"] *= 2
    path.write_text(json.dumps({**body, "checksum": store_format._checksum(body)}))
    with pytest.raises(CheckpointError, match="is not the file that"):
        lean_model(folder)


def test_a_field_that_another_transformer_lens_has(tmp_path: Path) -> None:
    """In use, it would change the numbers; at its default, it is left out."""
    folder = tmp_path / "copy"
    embedded().save_lean(folder)
    saved = read_manifest(folder)
    tomorrow = {**saved.configuration, "gates_of_tomorrow": True}
    versions = {**saved.versions, "transformer_lens": "3.99", "torch": "9.0"}
    rewritten(folder, configuration=tomorrow, versions=versions)
    words = r"TransformerLens 3\.99 with cfg\.gates_of_tomorrow=True, which .* does not have"
    with pytest.raises(CheckpointError, match=words):
        lean_model(folder)
    rewritten(folder, optional=[*saved.optional, "gates_of_tomorrow"])
    copy = lean_model(folder)
    assert any("transformer_lens 3.99" in note for note in copy.load_report.notes)
    yesterday = {k: v for k, v in tomorrow.items() if k != "use_attn_result"}
    rewritten(folder, configuration=yesterday)
    assert lean_model(folder).cfg.use_attn_result is False
    path = folder / MANIFEST
    body = json.loads(path.read_text())
    del body["checksum"]
    body["configuration"]["dtype"] = {"torch.dtype": "float3"}
    path.write_text(json.dumps({**body, "checksum": store_format._checksum(body)}))
    with pytest.raises(CheckpointError, match="'float3' is not a dtype"):
        lean_model(folder)


def test_places_that_cannot_be_saved_to(tmp_path: Path) -> None:
    model = embedded()
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="is a file"):
        model.save_lean(tmp_path / "file")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/config.json").touch()
    with pytest.raises(SaveError, match=r"config\.json"):
        model.save_lean(tmp_path / "checkpoint")
    with pytest.raises(SaveError, match="/proc"):
        model.save_lean("/proc/nowhere/copy")
    with pytest.raises(SaveError, match="not with a Linear"):
        save_lean(nn.Linear(1, 1), tmp_path / "copy")
    model.unembed.W_U = nn.Parameter(torch.empty(2, 2, device="meta"))
    with pytest.raises(SaveError, match=r"unembed\.W_U"):
        model.save_lean(tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "file"]


@pytest.mark.parametrize("there_before", [False, True])
def test_a_full_disk_leaves_what_was_there(
    there_before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = embedded()
    if there_before:
        model.save_lean(tmp_path / "copy")
    before = sorted(tmp_path.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # What a quota does to the weights, to the tokenizer (written by code in Rust), to any file.
    for most_bytes in (200_000, 1000, 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
        try:
            with pytest.raises(SaveError, match="could not be written"):
                model.save_lean(tmp_path / "copy")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(tmp_path.rglob("*")) == before

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tl_fastload.copies.folders.os.fsync", full)
    with pytest.raises(SaveError, match="No space left on device"):
        model.save_lean(tmp_path / "copy")
    monkeypatch.setattr("tl_fastload.copies.write._check_room", full)
    with pytest.raises(SaveError, match="No space left on device"):
        model.save_lean(tmp_path / "copy")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_is_too_small_is_known_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SaveError, match="has 1000 B free"):
        embedded().save_lean(tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []
