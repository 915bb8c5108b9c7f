"""Reading `.bin` and `.pth` files: what is mapped, what is read, what is refused."""

from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tl_fastload.errors import CheckpointError
from tl_fastload.ground import compat
from tl_fastload.source.torch_files import read_torch_files, whole_bytes

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def saved(path: Path, content: Any, **arguments: Any) -> Path:
    torch.save(content, path, **arguments)
    return path


def assert_equal(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)


def is_mapped(path: Path) -> bool:
    return any(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.skipif(not compat.can_map_torch_files(), reason="torch 2.0 cannot map")
def test_zip_files_are_mapped_only_if_allowed(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.bin", STATE)
    whole = read_torch_files((path,), mmap=False)
    assert not is_mapped(path)
    mapped = read_torch_files((path,))
    assert is_mapped(path)
    assert mapped.notes == whole.notes == ()
    assert_equal(mapped.tensors, STATE)
    assert_equal(whole.tensors, STATE)
    del mapped
    assert not is_mapped(path)


def test_the_old_format_is_read_whole_with_a_note(tmp_path: Path) -> None:
    path = saved(tmp_path / "old.bin", STATE, _use_new_zipfile_serialization=False)
    contents = read_torch_files((path,))
    assert_equal(contents.tensors, STATE)
    assert len(contents.notes) == 1
    assert "old.bin was read into memory" in contents.notes[0]
    assert read_torch_files((path,), mmap=False).notes == ()


def test_a_compressed_archive_is_not_mapped_as_if_it_were_plain(tmp_path: Path) -> None:
    plain = saved(tmp_path / "plain.bin", {"a": torch.zeros(4096)})
    packed = tmp_path / "packed.bin"
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for item in source.infolist():
            target.writestr(item.filename, source.read(item))
    contents = read_torch_files((packed,))
    assert_equal(contents.tensors, {"a": torch.zeros(4096)})
    assert "compressed" in contents.notes[0]


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_a_nested_state_dict_is_found_with_a_note(tmp_path: Path, key: str) -> None:
    content = {key: collections.OrderedDict(STATE), "epoch": 3, "loss": torch.tensor(0.5)}
    contents = read_torch_files((saved(tmp_path / "trained.pth", content),))
    assert_equal(contents.tensors, STATE)
    assert f"under the key {key!r}" in contents.notes[0]


def test_a_tensor_named_like_a_nesting_key_is_a_tensor(tmp_path: Path) -> None:
    content = {"model": torch.ones(2), "module": {"epoch": 3}}
    contents = read_torch_files((saved(tmp_path / "m.pth", content),))
    assert_equal(contents.tensors, {"model": torch.ones(2)})
    assert contents.notes == ()


def test_prefixes_are_left_to_those_who_know_the_model(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pth", {f"module.{name}": value for name, value in STATE.items()})
    contents = read_torch_files((path,))
    assert contents.tensors.keys() == {f"module.{name}" for name in STATE}
    assert not contents.notes


def test_other_values_are_passed_over(tmp_path: Path) -> None:
    content = {**STATE, "step": 5, "name": "x", 7: torch.ones(1), "none": None}
    assert_equal(read_torch_files((saved(tmp_path / "m.bin", content),)).tensors, STATE)


def test_parameters_come_detached_and_shared_storages_stay_shared(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 2))
    path = saved(tmp_path / "m.bin", {"a": weight, "tied": weight, "row": weight.data[1]})
    tensors = read_torch_files((path,)).tensors
    assert not any(value.requires_grad for value in tensors.values())
    assert tensors["a"].data_ptr() == tensors["tied"].data_ptr()
    assert torch.equal(tensors["row"], weight.data[1])


def test_shards_make_one_state_dict_and_must_not_collide(tmp_path: Path) -> None:
    first = saved(tmp_path / "1.bin", {"a": STATE["a"]})
    second = saved(tmp_path / "2.bin", {"b": STATE["b"]})
    assert_equal(read_torch_files((first, second)).tensors, STATE)
    saved(second, STATE)
    with pytest.raises(CheckpointError, match=r"'a' is in two files.*1\.bin.*2\.bin.*again"):
        read_torch_files((first, second))


class Payload:
    """Creates a file when it is unpickled by anyone who runs its code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_file_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_format: bool
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trap = tmp_path / "trap"
    content = {**STATE, "evil": Payload(trap)}
    path = saved(tmp_path / "evil.bin", content, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError) as caught:
        read_torch_files((path,))
    assert not trap.exists()
    text = str(caught.value)
    assert str(path) in text
    assert "mkdir" in text
    assert "never run" in text
    assert "safetensors" in text


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    path = tmp_path / "plain.bin"
    path.write_bytes(pickle.dumps({"evil": Payload(trap)}))
    with pytest.raises(CheckpointError, match=r"plain\.bin"):
        read_torch_files((path,))
    assert not trap.exists()


def test_a_whole_module_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "module.pth", torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"module\.pth holds .*Linear.*state_dict"):
        read_torch_files((path,))


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match=r"script\.pt holds a TorchScript program"):
        read_torch_files((path,))


def bytes_of(content: Any, **arguments: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **arguments)
    return buffer.getvalue()


ZIP = bytes_of(STATE)
OLD = bytes_of(STATE, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: a download that never finished"),
        (b"garbage", "is corrupt or no torch checkpoint"),
        (ZIP[: len(ZIP) // 2], "is corrupt or no torch checkpoint"),
        (OLD[: len(OLD) // 2], "is corrupt or no torch checkpoint"),
        (OLD[:-5], "is corrupt or no torch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (bytes_of([torch.ones(2)]), "holds no tensors by name .it is a list"),
        (bytes_of({"epoch": 1}), "holds no tensors by name"),
        (bytes_of({"a": torch.ones(2).to_sparse()}), "tensor 'a' is sparse"),
        (bytes_of({"a": torch.ones(2, device="meta")}), "tensor 'a' is sparse, quantized or wit"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_files((path,))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [ZIP, OLD], ids=["zip", "old"])
def test_damaged_bytes_raise_nothing_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.bin"
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            tensors = read_torch_files((path,)).tensors
        except CheckpointError:
            continue
        assert all(isinstance(value, torch.Tensor) for value in tensors.values())


def test_missing_and_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.bin: No such file"):
        read_torch_files((tmp_path / "gone.bin",))
    path = saved(tmp_path / "mine.bin", STATE)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=r"mine\.bin: Permission denied.*chmod"):
        read_torch_files((path,))


def rewritten(path: Path, kind: int, **records: Any) -> Path:
    """The file with other records (functions of what they were; None for none), compressed or
    not.
    """
    with zipfile.ZipFile(path) as archive:
        old = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in old.items():
            change = records.get(name.rpartition("/")[2], lambda content: content)
            if change is not None:
                archive.writestr(name, change(content))
    return path


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_each_record_is_as_long_as_its_tensors_need(
    tmp_path: Path, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {
        name: torch.zeros(3, 5, dtype=dtype)
        for name, dtype in vars(torch).items()
        if name in ("float32", "bfloat16", "float8_e4m3fn", "int64", "complex64", "bool", "uint16")
    }
    state["view"] = torch.arange(20.0)[5:11]  # in a larger storage
    path = tmp_path / "m.bin"
    torch.save(state, path)
    found = read_torch_files((rewritten(path, kind),)).tensors
    assert all(torch.equal(found[name].float(), state[name].float()) for name in state)

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("torch was asked to read it")

    for change in (
        lambda b: b[:-1],
        lambda b: b + bytes(4),
        lambda b: b"",
        lambda b: bytes(9 << 20),
    ):
        torch.save(state, path)
        broken = rewritten(path, kind, **{"1": change})
        with monkeypatch.context() as patched:
            patched.setattr(torch, "load", load)  # nothing is inflated before it is refused
            with pytest.raises(CheckpointError, match=r"m\.bin: the record 1 holds"):
                read_torch_files((broken,))
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="the record 1 holds 0 bytes"):
        read_torch_files((rewritten(path, kind, **{"1": None}),))


def test_a_compressed_file_counts_as_what_it_becomes(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    torch.save({"x": torch.zeros(1 << 20)}, path)
    rewritten(path, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    assert whole_bytes((path,), mmap=True) > 4 << 20
