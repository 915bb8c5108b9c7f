"""The header reader against the safetensors library, and against files that lie."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file

from tl_fastload.errors import CheckpointError
from tl_fastload.source.safetensors import DTYPES, TensorEntry, read_header

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
NARROW = [getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)]


def tensor_of(entry: TensorEntry) -> torch.Tensor:
    """The entry's tensor, read by its offset alone."""
    with entry.path.open("rb") as file:
        file.seek(entry.offset)
        data = bytearray(file.read(entry.nbytes))
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return flat.view(entry.dtype).reshape(entry.shape)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*flat)


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with this header, JSON or bytes, and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, *NARROW], ids=str)
def test_every_dtype_is_found_where_it_lies(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randint(0, 2, (3, 5)).to(dtype)
    path = tmp_path / "model.safetensors"
    save_file({"before": torch.ones(7, dtype=torch.uint8), "x": values}, path)
    found = read_header(path)["x"]
    assert (found.dtype, found.shape, found.nbytes) == (dtype, (3, 5), 15 * values.element_size())
    assert same_bits(tensor_of(found), values)


def test_scalars_empty_tensors_metadata_and_odd_names(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        'näme with "quotes" and \n': torch.arange(6).reshape(2, 3),
        "": torch.ones(1),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "dtype": "F32"})
    entries = read_header(path)
    assert entries.keys() == tensors.keys()
    assert all(same_bits(tensor_of(entries[name]), value) for name, value in tensors.items())


@pytest.mark.parametrize("name", ["x", "xy", "xyz"])
def test_unaligned_data_is_found_where_it_lies(tmp_path: Path, name: str) -> None:
    """Nothing in the format aligns the data; only the library's own writer does."""
    values = torch.tensor([1.5, -2.25])
    path = write(tmp_path / "m.safetensors", {name: entry()}, values.numpy().tobytes())
    found = read_header(path)[name]
    assert found.offset == path.stat().st_size - 8
    assert same_bits(tensor_of(found), values)


def test_a_file_with_no_tensors_has_no_entries(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "m.safetensors", {"__metadata__": {"a": "b"}})) == {}


FAULTS = {
    "not json": (b"{nonsense", b"", "corrupt header"),
    "not utf-8": (b'{"\xff": 1}', b"", "corrupt header"),
    "not an object": (b"[1, 2]", b"", "not a JSON object"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", "corrupt header"),
    "huge number": (b'{"a":' + b"9" * 5000 + b"}", b"", "corrupt header"),
    "name twice": (
        json.dumps({"a": entry(), "b": 0}).replace('"b"', '"a"').encode(),
        b"x" * 8,
        "'a' occurs twice",
    ),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"x" * 8, "tensor 'a' lacks"),
    "no object": ({"a": 5}, b"", "tensor 'a' lacks"),
    "unknown dtype": ({"a": entry("Q7")}, b"x" * 8, "tensor 'a' has dtype 'Q7'"),
    "dtype no string": ({"a": entry(["F32"])}, b"x" * 8, "tensor 'a' has dtype"),
    "negative size": ({"a": entry(shape=[-2])}, b"x" * 8, "tensor 'a' has a shape that is none"),
    "fraction": ({"a": entry(shape=[2.0])}, b"x" * 8, "tensor 'a' has a shape that is none"),
    "true as size": ({"a": entry(shape=[True, 2])}, b"x" * 8, "'a' has a shape that is none"),
    "size too large": ({"a": entry(shape=[0, 2**63], offsets=[0, 0])}, b"", "shape that is none"),
    "shape no list": ({"a": entry(shape={"0": 2})}, b"x" * 8, "'a' has a shape that is none"),
    "offsets backwards": ({"a": entry(offsets=[8, 0])}, b"x" * 8, "'a' has data_offsets"),
    "three offsets": ({"a": entry(offsets=[0, 8, 8])}, b"x" * 8, "'a' has data_offsets"),
    "size mismatch": ({"a": entry(shape=[3])}, b"x" * 8, "8 bytes of data where dtype F32"),
    "overlap": (
        {"a": entry(), "b": entry(offsets=[4, 12])},
        b"x" * 12,
        "tensor 'b' overlaps",
    ),
    "gap": ({"a": entry(), "b": entry(offsets=[12, 20])}, b"x" * 20, "tensor 'b' leaves a gap"),
    "not from zero": ({"a": entry(offsets=[4, 12])}, b"x" * 12, "tensor 'a' leaves a gap"),
    "data cut": ({"a": entry()}, b"x" * 7, "truncated: its header names 8 bytes"),
    "data left over": ({"a": entry()}, b"x" * 9, "holds 1 bytes that no tensor"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_header_is_refused_with_file_and_remedy(tmp_path: Path, fault: str) -> None:
    header, data, message = FAULTS[fault]
    path = write(tmp_path / "faulty.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    text = str(caught.value)
    assert str(path) in text
    assert message in text
    assert "again" in text or "Update torch" in text
    assert len(text) < 1000


def test_the_library_refuses_the_same_headers(tmp_path: Path) -> None:
    """We are not stricter than what everybody else reads."""
    for number, (header, data, _) in enumerate(FAULTS.values()):
        path = write(tmp_path / f"{number}.safetensors", header, data)
        with pytest.raises((SafetensorError, TypeError)):
            load_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x01\x02", "is not a safetensors file"),
        (b"\xff" * 40, "is not a safetensors file"),
        ((200).to_bytes(8, "little") + b"{}", "is truncated: its header alone should take 200"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"version 1 of something else entirely", "is not a safetensors file"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_missing_folders_and_unreadable_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: No such file.*again"):
        read_header(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_header(tmp_path)
    path = tmp_path / "mine.safetensors"
    save_file({"x": torch.ones(2)}, path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Root may read anything, so the refusal is played.
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=r"mine\.safetensors: Permission denied.*chmod"):
        read_header(path)


def test_only_the_header_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.safetensors"
    text = json.dumps({"x": entry("U8", [1 << 40], [0, 1 << 40])}).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + (1 << 40))  # a terabyte that takes no room on disk
    assert read_header(path)["x"].nbytes == 1 << 40


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(st.lists(st.text(max_size=8), unique=True, max_size=5))
    tensors = {}
    for name in names:
        if name == "__metadata__":
            continue
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from([*FLOATS, *INTEGERS, *NARROW]))
        tensors[name] = torch.randint(0, 2, shape).to(dtype)
    return tensors


@given(tensors=state_dicts())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_of_the_library_read_equal(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(tensors))
    entries = read_header(path)
    expected = load_file(path)
    assert entries.keys() == expected.keys()
    assert all(same_bits(tensor_of(entries[name]), value) for name, value in expected.items())


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """A valid file with some bytes replaced, inserted, or cut off at the end."""
    content = bytearray(save({"a.weight": torch.ones(2, 3), "b": torch.arange(4)}))
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, header_end))
        kind = draw(st.sampled_from(["replace", "insert", "digit", "cut"]))
        if kind == "replace":
            content[place : place + 1] = draw(st.binary(min_size=1, max_size=3))
        elif kind == "insert":
            content[place:place] = draw(st.binary(max_size=3))
        elif kind == "digit":
            digits = [
                i for i in range(8, min(header_end, len(content))) if chr(content[i]).isdigit()
            ]
            if digits:
                content[draw(st.sampled_from(digits))] = draw(st.sampled_from(b"0123456789"))
        else:
            del content[draw(st.integers(0, len(content))) :]
    return bytes(content)


@given(content=mutated_files() | st.binary(max_size=200))
@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_files_are_read_like_the_library_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(content)
    try:
        entries = read_header(path)
    except CheckpointError:
        return
    try:
        expected = load(content)
    except SafetensorError:
        # Ours may be more lenient only where no tensor is at stake: metadata is not looked at.
        assert b"__metadata__" in content
        return
    assert entries.keys() == expected.keys()
    assert all(same_bits(tensor_of(entries[name]), value) for name, value in expected.items())


def test_the_table_of_dtypes_has_what_this_torch_has() -> None:
    assert {*FLOATS, *INTEGERS, *NARROW} <= set(DTYPES.values())
