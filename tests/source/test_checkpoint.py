"""Folders: which weights are taken, and what is refused before any of them is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from tests.support.fake_hub import fill_cache, resolve
from tests.support.folders import (
    BIN_INDEX,
    INDEX,
    SHARDED,
    SHARDED_BIN,
    STATE,
    folder_with,
    index_of,
)
from tl_fastload.errors import ArgumentError, CheckpointError
from tl_fastload.source.choose import choose


def refusal(folder: Path | str, **arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve(folder, **arguments)
    return str(caught.value)


# ------------------------------------------------------------------- what is found


@pytest.mark.parametrize("as_text", [True, False])
def test_a_single_safetensors_file(tmp_path: Path, as_text: bool) -> None:
    folder = folder_with(tmp_path / "m", {"model.safetensors": STATE})
    checkpoint = resolve(str(folder) if as_text else folder)
    assert checkpoint.folder == folder
    assert checkpoint.label == str(folder)
    assert checkpoint.files == (folder / "model.safetensors",)
    assert {name: tuple(entry.shape) for name, entry in checkpoint.entries.items()} == {
        "a": (4,),
        "b": (2, 3),
    }
    assert checkpoint.commit is None
    assert checkpoint.notes == ()
    assert checkpoint.load_tensors().tensors == {}


def test_sharded_safetensors(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", SHARDED)
    checkpoint = resolve(folder)
    assert [path.name for path in checkpoint.files] == ["s-1.safetensors", "s-2.safetensors"]
    assert checkpoint.entries["a"].path == folder / "s-1.safetensors"
    assert checkpoint.entries["b"].path == folder / "s-2.safetensors"


@pytest.mark.parametrize("files", [{"pytorch_model.bin": STATE}, SHARDED_BIN], ids=["one", "two"])
def test_torch_files_are_opened_only_when_asked(tmp_path: Path, files: dict[str, Any]) -> None:
    checkpoint = resolve(folder_with(tmp_path / "m", files))
    assert checkpoint.entries == {}
    tensors = checkpoint.load_tensors().tensors
    assert tensors.keys() == STATE.keys()
    assert all(torch.equal(tensors[name], value) for name, value in STATE.items())


def test_opening_torch_files_reads_none_of_their_content(tmp_path: Path) -> None:
    checkpoint = resolve(folder_with(tmp_path / "m", {"pytorch_model.bin": b"not weights"}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is corrupt"):
        checkpoint.load_tensors()


def test_safetensors_go_before_torch_files_unless_told_otherwise(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", {"pytorch_model.bin": STATE, **SHARDED})
    assert resolve(folder).entries
    assert resolve(folder, use_safetensors=True).entries
    assert resolve(folder, use_safetensors=False).files == (folder / "pytorch_model.bin",)
    only_bin = folder_with(tmp_path / "bin", {"pytorch_model.bin": STATE})
    assert "model.safetensors" in refusal(only_bin, use_safetensors=True)


def test_variants(tmp_path: Path) -> None:
    files = {"model.safetensors": STATE, "model.fp16.safetensors": {"a": STATE["a"].half()}}
    folder = folder_with(tmp_path / "m", files)
    assert resolve(folder, variant="fp16").entries["a"].dtype == torch.float16
    assert resolve(folder).entries["a"].dtype == torch.float32
    assert "model.fp8.safetensors" in refusal(folder, variant="fp8")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["weights.safetensors"], "weights.safetensors"),
        (["weights.safetensors", "a.bin", "b.bin"], "weights.safetensors"),
        (["adapter_model.safetensors", "w.safetensors"], "w.safetensors"),
        (["SoLU_2L_final.pth", "other.pth"], "SoLU_2L_final.pth"),
        (["training_args.bin", "optimizer.pt", "x.pth"], "x.pth"),
        (["checkpoints/x_final.pth"], None),
        (["a.safetensors", "b.safetensors", "c.bin"], None),
        (["a.bin", "b.bin"], None),
        (["training_args.bin"], None),
        (["adapter_model.bin"], None),
    ],
)
def test_files_of_other_names_are_taken_only_when_clear(
    names: list[str], expected: str | None
) -> None:
    choice = choose(names)
    assert (choice.name if choice else None) == expected
    if choice:
        assert expected in (choice.note or "")


def test_a_lone_file_is_noted(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", {"finetuned.safetensors": STATE})
    assert "finetuned.safetensors" in resolve(folder).notes[0]


def test_a_named_weights_file(tmp_path: Path) -> None:
    files = {"model.safetensors": STATE, "checkpoints/m_100.pth": {"c": torch.ones(1)}}
    folder = folder_with(tmp_path / "m", files)
    checkpoint = resolve(folder, weights_file="checkpoints/m_100.pth")
    assert checkpoint.load_tensors().tensors.keys() == {"c"}
    assert "m_100.pth" in checkpoint.notes[0]
    assert "has no file 'x.pth'" in refusal(folder, weights_file="x.pth")
    for outside in ("../m/model.safetensors", str(folder / "model.safetensors"), r"..\x.pth"):
        with pytest.raises(ArgumentError, match=r"weights_file=.*relative"):
            resolve(folder, weights_file=outside)


@pytest.mark.parametrize(
    ("files", "hints"),
    [
        ({}, ["model.safetensors", INDEX, "pytorch_model.bin", BIN_INDEX, "save_pretrained"]),
        ({"m.gguf": b"GGUF"}, ["pass gguf_file= with one of m.gguf"]),
        ({"tf_model.h5": b"x", "flax_model.msgpack": b"x"}, ["TensorFlow", "Flax", "convert"]),
        ({"adapter_model.safetensors": STATE}, ["adapter (LoRA)"]),
        (
            {"m-1-of-2.safetensors": STATE, "m-2-of-2.safetensors": STATE},
            ["m-1-of-2.safetensors, m-2-of-2.safetensors", "index", "weights_file="],
        ),
        ({"model.safetensors.incomplete": b"x"}, ["cut off (model.safetensors.incomplete)"]),
        ({".cache/huggingface/download/x.incomplete": b"x"}, ["cut off (x.incomplete)"]),
    ],
)
def test_a_folder_without_weights(tmp_path: Path, files: dict[str, Any], hints: list[str]) -> None:
    folder = folder_with(tmp_path / "m", files)
    message = refusal(folder)
    assert f"{folder} holds no weights" in message
    for hint in hints:
        assert hint in message


# ------------------------------------------------------------------- shards and indices


def test_all_missing_shards_are_in_one_message(tmp_path: Path) -> None:
    homes = {"a": "s-1.safetensors", "b": "s-2.safetensors", "c": "s-3.safetensors"}
    files = {"s-2.safetensors": {"b": STATE["b"]}, INDEX: index_of(**homes)}
    folder = folder_with(tmp_path / "m", {**files, "s-3.safetensors.incomplete": b""})
    message = refusal(folder)
    assert f"{folder} lacks 2 of the 3 weight files" in message
    assert "s-1.safetensors, s-3.safetensors." in message
    assert "cut off (s-3.safetensors.incomplete)" in message
    assert "again" in message


@pytest.mark.parametrize(
    "shard",
    [
        "/etc/passwd",
        "../other.safetensors",
        "x/../../o.safetensors",
        r"..\o",
        r"C:\o",
        "",
        5,
        "a\0",
    ],
)
def test_an_index_must_not_point_outside(tmp_path: Path, shard: Any) -> None:
    folder = folder_with(tmp_path / "m", {INDEX: index_of(weight=shard)})
    save_file(STATE, tmp_path / "other.safetensors")
    message = refusal(folder)
    assert str(folder / INDEX) in message
    assert repr(shard) in message
    assert "'weight'" in message
    assert "not inside" in message
    assert "trust" in message


def test_shards_in_a_folder_below_are_inside(tmp_path: Path) -> None:
    files = {"parts/s-1.safetensors": STATE, INDEX: index_of(a="parts/s-1.safetensors")}
    checkpoint = resolve(folder_with(tmp_path / "m", files))
    assert checkpoint.entries.keys() == STATE.keys()


def test_a_shard_must_not_be_a_link_out_of_its_folder(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", SHARDED)
    outside = tmp_path / "outside.safetensors"
    (folder / "s-1.safetensors").rename(outside)
    (folder / "s-1.safetensors").symlink_to(outside)
    message = refusal(folder)
    assert str(folder / "s-1.safetensors") in message
    assert str(outside) in message
    assert "Put the file itself" in message
    (folder / "s-1.safetensors").unlink()
    outside.rename(folder / "real.safetensors")
    (folder / "s-1.safetensors").symlink_to("real.safetensors")
    assert resolve(folder).entries.keys() == STATE.keys()


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    folder_with(tmp_path / "real", SHARDED)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert resolve(tmp_path / "link").entries.keys() == STATE.keys()


def test_a_snapshot_folder_of_the_hub_cache_may_be_passed_as_a_folder(tmp_path: Path) -> None:
    files = {
        name: json.dumps(content).encode() if name == INDEX else save(content)
        for name, content in SHARDED.items()
    }
    snapshot = fill_cache(tmp_path, "org/name", {"config.json": b"{}", **files})
    assert resolve(snapshot).entries.keys() == STATE.keys()
    assert resolve(snapshot).label == str(snapshot)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "holds a list, not a JSON object"),
        (b'{"weight_map": {}}', "has no 'weight_map'"),
        (b'{"weight_map": ["a"]}', "has no 'weight_map'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_corrupt_index(tmp_path: Path, content: bytes, message: str) -> None:
    folder = folder_with(tmp_path / "m", {INDEX: content})
    found = refusal(folder)
    assert str(folder / INDEX) in found
    assert message in found


def test_an_index_may_not_promise_what_its_shards_lack(tmp_path: Path) -> None:
    swapped = index_of(a="s-2.safetensors", b="s-2.safetensors", c="s-1.safetensors")
    message = refusal(folder_with(tmp_path / "m", {**SHARDED, INDEX: swapped}))
    assert "promises 2 tensors" in message
    assert "a (s-2.safetensors), c (s-1.safetensors)" in message
    assert "download them again" in message
    many = index_of(**{f"t{i}": "s-1.safetensors" for i in range(50)})
    assert "and 30 more" in refusal(folder_with(tmp_path / "many", {**SHARDED, INDEX: many}))


def test_an_index_of_torch_files_is_checked_when_they_are_read(tmp_path: Path) -> None:
    promised = index_of(a="s-1.bin", b="s-2.bin", c="s-2.bin")
    checkpoint = resolve(folder_with(tmp_path / "m", {**SHARDED_BIN, BIN_INDEX: promised}))
    with pytest.raises(CheckpointError, match=r"promises 1 tensors .*: c\. .*download"):
        checkpoint.load_tensors()


def test_tensors_that_the_index_forgot_are_known(tmp_path: Path) -> None:
    forgetful = index_of(a="s-1.safetensors", b="s-2.safetensors")
    second = {"b": STATE["b"], "extra": torch.ones(1)}
    files = {**SHARDED, INDEX: forgetful, "s-2.safetensors": second}
    assert resolve(folder_with(tmp_path / "m", files)).entries.keys() == {"a", "b", "extra"}


def test_one_name_in_two_shards(tmp_path: Path) -> None:
    files = {**SHARDED, "s-2.safetensors": STATE}
    message = refusal(folder_with(tmp_path / "m", files))
    assert re.search(r"'a' is in two files: .*s-1\.safetensors and .*s-2\.safetensors", message)
    assert "again" in message


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "is truncated"),
        (lambda data: b"", "is empty"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (lambda data: data[:8] + b"?" + data[9:], "corrupt header"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    folder = folder_with(tmp_path / "m", SHARDED)
    shard = folder / "s-2.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))
    found = refusal(folder)
    assert str(shard) in found
    assert message in found


def test_a_broken_link_and_a_file_without_tensors(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", {})
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "what it points to is gone" in refusal(folder)
    (folder / "model.safetensors").unlink()
    save_file({}, folder / "model.safetensors")
    assert "names no tensors" in refusal(folder)


def test_no_file_stays_open_or_mapped(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc")
    folder = folder_with(tmp_path / "m", SHARDED)
    before = len(list(descriptors.iterdir()))
    checkpoint = resolve(folder)
    assert len(list(descriptors.iterdir())) == before
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert checkpoint.entries
