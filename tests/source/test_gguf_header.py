"""The reader of GGUF headers against the gguf package, and against files that lie."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Ggml

from tl_fastload.errors import CheckpointError, QuantizationError
from tl_fastload.source.gguf import (
    Omitted,
    first_of_splits,
    joined_entries,
    read_gguf,
    shard_names,
)


def written(path: Path, version: int = 3) -> Path:
    """A small file of every kind of metadata."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -300)
    writer.add_int32("i32", -70000)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("flag", True)
    writer.add_string("text", "zwölf")
    writer.add_array("some", [1, 2, 3])
    writer.add_array("many", list(range(5000)))
    writer.add_array("words", ["a", "", "ß"])
    writer.add_tensor("plain", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("half", np.ones(5, dtype=np.float16))
    writer.add_tensor("codes", np.zeros((3, 2, 68), np.uint8), raw_dtype=Ggml.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = bytearray(path.read_bytes())
    data[4] = version
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_what_the_gguf_package_writes(tmp_path: Path, version: int) -> None:
    path = written(tmp_path / "m.gguf", version)
    header = read_gguf(path)
    reader = gguf.GGUFReader(path)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("many", "words"):
            continue
        assert header.metadata[name] == field.contents(), name
    assert header.metadata["many"] == Omitted(5000)
    assert header.metadata["words"] == Omitted(3)
    wanted = read_gguf(path, ["many", "words"]).metadata
    assert wanted["many"] == list(range(5000))
    assert wanted["words"] == ["a", "", "ß"]
    assert list(header.entries) == ["plain", "half", "codes.Q8_0"]
    for entry, tensor in zip(header.entries.values(), reader.tensors, strict=True):
        assert (entry.offset, entry.nbytes) == (tensor.data_offset, tensor.n_bytes)
    codes = header.entries["codes.Q8_0"]
    assert (codes.dtype, codes.shape) == (torch.uint8, (3, 2, 68))
    assert header.entries["plain"].shape == (2, 3)


def test_a_large_vocabulary_takes_no_time_to_count(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("words", [f"w{number}" for number in range(100_000)])
    writer.add_tensor("x", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf(tmp_path / "m.gguf")
    assert header.metadata["words"] == Omitted(100_000)
    assert header.entries["x"].shape == (3,)


Change = Callable[[bytearray], Any]


def _at(data: bytearray, text: bytes) -> int:
    """Where the value of a key begins, or what follows a tensor's name."""
    return data.index(struct.pack("<Q", len(text)) + text) + 8 + len(text)


def _put(text: bytes, behind: int, kind: str, *values: int) -> Change:
    """Write numbers behind the name of a key or tensor."""

    def change(data: bytearray) -> None:
        struct.pack_into(f"<{kind}", data, _at(data, text) + behind, *values)

    return change


def _head(at: int, kind: str, *values: int) -> Change:
    return lambda data: struct.pack_into(f"<{kind}", data, at, *values)


# Behind a tensor's name: dimensions (4), sizes (8 each), type (4), offset (8).
BAD: dict[str, tuple[Change, str]] = {
    "magic": (_head(0, "4s", b"GGML"), r"is not a GGUF file: it begins with b'GGML'"),
    "version 1": (_head(4, "I", 1), "of version 1 of GGUF"),
    "version 4": (_head(4, "I", 4), "of version 4 of GGUF"),
    "big-endian": (_head(4, ">I"[1:], 3 << 24), "is a big-endian GGUF file"),
    "tensors": (_head(8, "Q", 2**62), "claims 4,611,686,018,427,387,904 tensors"),
    "keys": (_head(16, "Q", 9_000), "claims 9,000 pairs of metadata, more than the file"),
    "more keys": (_head(16, "Q", 2**40), "at most 40,000 and 10,000 are read"),
    "kind of value": (_put(b"u8", 0, "I", 77), "value of the unknown kind 77.*metadata 'u8'"),
    "length of a text": (_put(b"text", 4, "Q", 2**60), "text of 1,152,921,504,606,846,976 bytes"),
    "longer than the file": (_put(b"text", 4, "Q", 1 << 20), "goes on to byte"),
    "members": (_put(b"many", 8, "Q", 2**50), "members of an array, more than the file"),
    "texts": (_put(b"words", 8, "Q", 2**50), "texts, more than the file"),
    "array of arrays": (_put(b"some", 4, "I", 9), "array of the kind 9"),
    "dimensions": (_put(b"plain", 0, "I", 9), "'plain' with 9 dimensions"),
    "sizes": (_put(b"plain", 4, "QQ", 2**62, 2**62), "'plain'.*larger than the whole file"),
    "type": (_put(b"plain", 20, "I", 999), "'plain' is of ggml's type 999, which is not read"),
    "i-quants": (_put(b"plain", 20, "I", 20), "ggml's type IQ4_NL.*Take another file"),
    "ternary": (_put(b"plain", 20, "I", 35), "ggml's type TQ2_0.*Take another file"),
    "rows": (_put(b"half", 12, "I", 8), "rows of 5 values, no whole blocks of 32"),
    "offset": (_put(b"plain", 24, "Q", 1 << 40), "is truncated: tensor 'plain' ends at"),
    "crooked": (_put(b"plain", 24, "Q", 7), "offset that is no multiple of 32"),
    "overlap": (_put(b"half", 16, "Q", 0), "where another one lies"),
    "twice": (lambda d: d.__setitem__(slice(_at(d, b"half") - 4, _at(d, b"half")), b"plai"), ""),
    "same key": (lambda d: d.__setitem__(slice(_at(d, b"i8") - 2, _at(d, b"i8")), b"u8"), "twice"),
    "cut": (lambda d: d.__delitem__(slice(-300, None)), "is truncated: tensor"),
    "cut early": (lambda d: d.__delitem__(slice(90, None)), "more than the file has|goes on to"),
    "LFS": (
        lambda d: d.__setitem__(slice(None), b"version https://git-lfs.github.com/spec/v1\n"),
        "Git-LFS pointer",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    change, message = BAD[name]
    path = written(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    if name == "twice":  # another name of the same length: nothing is wrong with that
        assert "plai" in read_gguf(path).entries
        return
    with pytest.raises((CheckpointError, QuantizationError), match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


def split(folder: Path, *, tensors: int = 2) -> list[Path]:
    """A model in two files, one tensor each."""
    names = [f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for number, name in enumerate(names):
        writer = gguf.GGUFWriter(folder / name, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", tensors)
        writer.add_tensor(f"t{number}", np.ones(3, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return [folder / name for name in names]


def test_files_that_belong_together(tmp_path: Path) -> None:
    first, second = split(tmp_path)
    for one in (first, second):
        assert shard_names(one.name, read_gguf(one)) == [first.name, second.name]
    assert list(joined_entries([first, second])) == ["t0", "t1"]
    assert first_of_splits([second.name, first.name, "x.gguf", "y.txt"]) == [first.name, "x.gguf"]
    with pytest.raises(CheckpointError, match=r"is file 1 of 2 .*where file 0 of 2 belongs"):
        joined_entries([second, first])
    with pytest.raises(CheckpointError, match=r"one of 2 files .*Give them their names"):
        shard_names("other.gguf", read_gguf(first))
    with pytest.raises(CheckpointError, match=r"one of 2 files .*its name says 00003"):
        shard_names("m-00001-of-00003.gguf", read_gguf(first))
    with pytest.raises(CheckpointError, match=r"have 2 tensors, not 5 \(split.tensors.count\)"):
        joined_entries(split(tmp_path, tensors=5))
