"""The table of tensors in a GGUF file, and what its metadata say, read from its header alone.

The format (docs/gguf.md in llama.cpp's ggml): "GGUF", a version, counts of tensors and of metadata;
pairs of a key and a typed value; a name, dimensions (fastest first), a type and an offset for each
tensor; then the data, aligned. All of it is little-endian here. No number of a file decides how
much memory is taken before the file is known to be as large as that number says.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tl_fastload.errors import CheckpointError, QuantizationError
from tl_fastload.source.file_states import FileState, changed, unreadable
from tl_fastload.source.ggml_types import REFUSED, TYPES
from tl_fastload.source.json_files import open_regular, short
from tl_fastload.source.safetensors import (
    AGAIN,
    LFS_PREFIX,
    MAX_TENSORS,
    TensorEntry,
    check_weight_file,
    lfs_pointer,
)

SUFFIX = ".gguf"
MAX_HEADER_BYTES = 128 << 20
"""Of a header; vocabularies of 256 thousand tokens with their merges take 16 MB."""
_CHUNK_BYTES = 1 << 20
_MOST_KEYS = 10_000
_MOST_DIMENSIONS = 4
_MOST_TEXT_BYTES = 16 << 20
_SHORT_ARRAY = 1024
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"} | {
    12: "d"
}
_TEXT, _ARRAY = 8, 9
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class Omitted:
    """An array of the metadata that was not asked for.

    Attributes:
        count: of its members.
    """

    count: int


@dataclass(frozen=True)
class GgufHeader:
    """What a file says before its data.

    Attributes:
        metadata: key -> number, text, flag, list, or `Omitted`.
        entries: where each tensor lies. One of blocks is [..., bytes of a row] uint8, and has the
            type behind its name: "blk.0.attn_q.weight.Q4_K".
    """

    metadata: Mapping[str, Any]
    entries: Mapping[str, TensorEntry] = field(repr=False)


class _Corrupt(Exception):  # noqa: N818  # becomes a CheckpointError, which names the file
    """A header contradicts itself, or the file's size."""


class _Cursor:
    """Reads a header from its start, no further than the file and the bound reach."""

    def __init__(self, file: BinaryIO, file_bytes: int) -> None:
        self._file, self._file_bytes = file, file_bytes
        self._held = bytearray()
        self.at = 0

    def need(self, count: int) -> int:
        """Have that many bytes more; where they begin."""
        start, stop = self.at, self.at + count
        if stop > self._file_bytes:
            raise _Corrupt(
                f"is truncated or corrupt: its header goes on to byte {stop:,}, the file has "
                f"{self._file_bytes:,} bytes"
            )
        if stop > MAX_HEADER_BYTES:
            raise _Corrupt(f"has a header of more than {MAX_HEADER_BYTES:,} bytes")
        while len(self._held) < stop:
            got = self._file.read(max(_CHUNK_BYTES, stop - len(self._held)))
            if not got:
                raise _Corrupt("became shorter while it was being read")
            self._held += got
        self.at = stop
        return start

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        """Numbers of one kind, as `struct` names it."""
        start = self.need(count * struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{count}{code}", self._held, start)

    def number(self, code: str) -> Any:
        return self.numbers(code)[0]

    def text(self) -> str:
        """A text, its length in front."""
        size = self.number("Q")
        if size > _MOST_TEXT_BYTES:
            raise _Corrupt(f"has a text of {size:,} bytes in its header")
        start = self.need(size)
        # Vocabularies have tokens that are no valid UTF-8.
        return self._held[start : start + size].decode("utf-8", "replace")

    def skip_texts(self, count: int) -> None:
        for _ in range(count):
            self.need(self.number("Q"))

    def room_for(self, count: int, least_bytes: int, what: str) -> None:
        """Check that the rest of the file can hold so many things of at least some bytes."""
        if count * least_bytes > self._file_bytes - self.at:
            raise _Corrupt(f"claims {count:,} {what}, more than the file has bytes for")


def read_gguf(path: Path, arrays: Collection[str] = ()) -> GgufHeader:
    """The header of a GGUF file.

    Args:
        path: the file.
        arrays: keys of long arrays that are wanted; others are only counted.

    Raises:
        CheckpointError: the file cannot be read, is no GGUF file of version 2 or 3, is truncated,
            or contradicts itself.
        QuantizationError: a tensor is of a type that is not read.
    """
    check_weight_file(path)
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            state = FileState.of(file.fileno())
            cursor = _Cursor(file, state.size_bytes)
            return _header(path, cursor, state, frozenset(arrays))
    except OSError as error:
        raise unreadable(path, error) from error
    except _Corrupt as error:
        raise CheckpointError(f"{path} {error}. {AGAIN}.") from error


def first_of_splits(names: Collection[str]) -> list[str]:
    """The GGUF files among some, of those that are one of several the first."""
    files = sorted(name for name in names if name.endswith(SUFFIX))
    matches = {name: _SPLIT.search(name) for name in files}
    return [name for name, match in matches.items() if match is None or int(match[1]) == 1]


def shard_names(name: str, header: GgufHeader) -> list[str]:
    """The names of all files of a model, from that of one of them.

    Raises:
        CheckpointError: the file is one of several, and its name does not say which.
    """
    count = header.metadata.get("split.count", 1)
    if count == 1:
        return [name]
    found = _SPLIT.search(name)
    if type(count) is not int or not 1 <= count < 100_000 or found is None:
        raise CheckpointError(
            f"{name} says that it is one of {short(count)} files (split.count), which are named "
            f"...-00001-of-00002.gguf and so on. Give them their names again."
        )
    if int(found[2]) != count:
        raise CheckpointError(
            f"{name} says that it is one of {count} files (split.count), its name says {found[2]}. "
            f"{AGAIN}."
        )
    return [f"{name[: found.start()]}-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1)]


def joined_entries(paths: Collection[Path]) -> dict[str, TensorEntry]:
    """The entries of all files of a model, in their order.

    Raises:
        CheckpointError, QuantizationError: as `read_gguf`, or the files are not of one model.
    """
    entries: dict[str, TensorEntry] = {}
    wanted = None
    for number, path in enumerate(paths):
        header = read_gguf(path)
        said = header.metadata.get("split.no", 0), header.metadata.get("split.count", 1)
        if said != (number, len(paths)):
            raise CheckpointError(
                f"{path} says that it is file {said[0]} of {said[1]} (split.no, counted from 0), "
                f"and stands where file {number} of {len(paths)} belongs. {AGAIN}."
            )
        wanted = header.metadata.get("split.tensors.count", wanted)
        twice = entries.keys() & header.entries.keys()
        if twice:
            raise CheckpointError(f"{path}: tensor {min(twice)} is in another file, too. {AGAIN}.")
        entries.update(header.entries)
    if wanted is not None and len(paths) > 1 and wanted != len(entries):
        raise CheckpointError(
            f"{next(iter(paths))} and the files that belong to it have {len(entries)} tensors, "
            f"not {short(wanted)} (split.tensors.count). {AGAIN}."
        )
    if not entries:
        raise CheckpointError(f"{next(iter(paths))} names no tensors. {AGAIN}.")
    return entries


def _header(path: Path, cursor: _Cursor, state: FileState, arrays: frozenset[str]) -> GgufHeader:
    tensor_count, key_count = _counts(path, cursor)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text()
        if key in metadata:
            raise _Corrupt(f"has the key {short(key)} twice in its metadata")
        try:
            metadata[key] = _value(cursor, cursor.number("I"), key in arrays)
        except _Corrupt as error:
            raise _Corrupt(f"{error} (metadata {short(key)})") from error
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise _Corrupt(f"has general.alignment {short(alignment)}, which is no power of two")
    infos = [_info(cursor) for _ in range(tensor_count)]
    start = -(-cursor.at // alignment) * alignment
    if FileState.of(path) != state:
        raise changed(path)
    entries: dict[str, TensorEntry] = {}
    for name, shape, number, offset in infos:
        entry = _entry(path, name, shape, number, state)
        if offset % alignment:
            raise _Corrupt(f"has tensor {name!r} at an offset that is no multiple of {alignment}")
        if start + offset + entry.nbytes > state.size_bytes:
            raise _Corrupt(
                f"is truncated: tensor {name!r} ends at byte {start + offset + entry.nbytes:,}, "
                f"the file has {state.size_bytes:,} bytes"
            )
        if entry.name in entries:
            raise _Corrupt(f"has the tensor {name!r} twice")
        entries[entry.name] = TensorEntry(
            entry.name, entry.dtype, entry.shape, path, start + offset, entry.nbytes, state
        )
    _check_apart(entries)
    return GgufHeader(metadata, entries)


def _counts(path: Path, cursor: _Cursor) -> tuple[int, int]:
    """The numbers of tensors and of pairs of metadata."""
    magic = bytes(cursor.numbers("B", 4))
    if LFS_PREFIX.startswith(magic):
        raise lfs_pointer(path)
    if magic != b"GGUF":
        raise _Corrupt(f"is not a GGUF file: it begins with {magic!r}, not b'GGUF'")
    version = cursor.number("I")
    if version & 0xFFFF == 0 and version:
        raise _Corrupt(
            "is a big-endian GGUF file, which is not read: convert it with gguf-py's "
            "gguf_convert_endian"
        )
    if version not in (2, 3):
        raise _Corrupt(
            f"is of version {version} of GGUF, not 2 or 3: convert the model again with llama.cpp"
        )
    tensors, keys = cursor.numbers("Q", 2)
    if tensors > MAX_TENSORS or keys > _MOST_KEYS:
        raise _Corrupt(
            f"claims {tensors:,} tensors and {keys:,} pairs of metadata; at most {MAX_TENSORS:,} "
            f"and {_MOST_KEYS:,} are read"
        )
    cursor.room_for(keys, 13, "pairs of metadata")
    cursor.room_for(tensors, 32, "tensors")
    return tensors, keys


def _value(cursor: _Cursor, kind: int, is_wanted: bool) -> Any:
    if kind in _NUMBERS:
        return cursor.number(_NUMBERS[kind])
    if kind == _TEXT:
        return cursor.text()
    if kind != _ARRAY:
        raise _Corrupt(f"has a value of the unknown kind {kind}")
    inner, count = cursor.number("I"), cursor.number("Q")
    if inner in _NUMBERS:
        width = struct.calcsize(f"<{_NUMBERS[inner]}")
        cursor.room_for(count, width, "members of an array")
        if is_wanted or count <= _SHORT_ARRAY:
            return list(cursor.numbers(_NUMBERS[inner], count))
        cursor.need(width * count)
        return Omitted(count)
    if inner != _TEXT:
        raise _Corrupt(f"has an array of the kind {inner}, which is not read")
    cursor.room_for(count, 8, "texts")
    if is_wanted:
        return [cursor.text() for _ in range(count)]
    cursor.skip_texts(count)
    return Omitted(count)


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape as torch writes it, type and offset of the next tensor."""
    name, dimensions = cursor.text(), cursor.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise _Corrupt(f"has tensor {short(name)} with {dimensions:,} dimensions")
    sizes = cursor.numbers("Q", dimensions)
    return name, tuple(reversed(sizes)), cursor.number("I"), cursor.number("Q")


def _entry(
    path: Path, name: str, shape: tuple[int, ...], number: int, state: FileState
) -> TensorEntry:
    """A tensor as it is stored, at no place yet."""
    kind = TYPES.get(number)
    if kind is None:
        raise QuantizationError(
            f"{path}: tensor {name!r} is of ggml's type {REFUSED.get(number, number)}, which is "
            "not read. Take another file of this model, such as Q4_K_M, Q6_K or Q8_0: "
            f"{', '.join(one.name for one in TYPES.values())} are read."
        )
    if shape[-1] % kind.size:
        raise _Corrupt(
            f"has tensor {name!r} with rows of {shape[-1]:,} values, no whole blocks of "
            f"{kind.size} ({kind.name})"
        )
    row_bytes = shape[-1] // kind.size * kind.nbytes
    nbytes = math.prod(shape[:-1]) * row_bytes
    if nbytes > state.size_bytes:
        raise _Corrupt(
            f"has tensor {name!r} {short(list(shape))} of {kind.name}, larger than the whole file"
        )
    if kind.dtype is not None:
        return TensorEntry(name, kind.dtype, shape, path, 0, nbytes, state)
    stored = (*shape[:-1], row_bytes)
    return TensorEntry(f"{name}.{kind.name}", torch.uint8, stored, path, 0, nbytes, state)


def _check_apart(entries: Mapping[str, TensorEntry]) -> None:
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.nbytes and entry.offset < end:
            raise _Corrupt(f"has tensor {entry.name!r} where another one lies")
        end = max(end, entry.offset + entry.nbytes)
