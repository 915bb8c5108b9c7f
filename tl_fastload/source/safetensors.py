"""The table of tensors in a safetensors file, read from its header alone.

The format: eight bytes with the header's length (little-endian), a JSON object that gives each
tensor's dtype, shape and `data_offsets` (from the end of the header), then the data without gaps.
The safetensors library keeps byte offsets to itself, and we need them to read straight into place.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tl_fastload.errors import CheckpointError
from tl_fastload.ground import compat
from tl_fastload.source.file_states import FileState, changed, unreadable
from tl_fastload.source.json_files import open_regular, short

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 16 << 20
"""Of a header; the largest that is known has 3 MB, and reading one takes fifty times as much."""
MAX_TENSORS = 40_000
MAX_DIMENSION = 2**63 - 1
MAX_DIMENSIONS = 64  # torch has no more
LFS_PREFIX = b"version https://git-lfs"
AGAIN = "Download or copy the file again"

_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
DTYPES: Mapping[str, torch.dtype] = compat.dtypes(_TORCH_NAMES)
_FORMAT_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where the bytes of one tensor lie.

    Attributes:
        name: the tensor's name in the checkpoint.
        dtype: as stored.
        shape: as stored, row-major and dense.
        path: the file.
        offset: byte offset of the first element from the start of the file.
        nbytes: size in bytes.
        state: what the file was when its header was read; None if it is not here.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    state: FileState | None = field(default=None, repr=False, compare=False)


def header_of(
    entries: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
    alignment_bytes: int = LENGTH_BYTES,
) -> bytes:
    """The header of a safetensors file, with its length in front.

    The format has no gaps: what fills them are tensors of their own.

    Args:
        entries: name -> dtype and shape, in the order of their bytes.
        metadata: what the header says beside them.
        alignment_bytes: every tensor starts at a multiple of this, from the start of the file.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0

    def add(name: str, kind: str, shape: Sequence[int], size: int) -> int:
        table[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        return at + size

    for name, (dtype, shape) in entries.items():
        item_bytes = torch.empty(0, dtype=dtype, device="cpu").element_size()
        at = add(name, _FORMAT_NAMES[dtype], shape, math.prod(shape) * item_bytes)
        if gap := -at % alignment_bytes:
            at = add(f"padding.{name}", "U8", [gap], gap)
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % alignment_bytes)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the entries of a safetensors file by name, in the order of its header.

    Raises:
        CheckpointError: the file cannot be read, is not a safetensors file, is truncated, or its
            header contradicts itself; names the file, and the tensor where there is one.
    """
    return parse_header(path, *header_text(path))[0]


def header_text(path: Path) -> tuple[bytes, FileState]:
    """The header of a safetensors file, its length in front, and what the file was.

    Raises:
        CheckpointError: the file cannot be read, is not a safetensors file, or is truncated.
    """
    check_weight_file(path)
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            state = FileState.of(file.fileno())
            header_bytes = _header_length(path, file, state.size_bytes)
            text = file.read(header_bytes)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(text) < header_bytes:
        raise changed(path)
    return header_bytes.to_bytes(LENGTH_BYTES, "little") + text, state


def parse_header(
    path: Path, text: bytes, state: FileState
) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    """The entries in what `header_text` has read, as of `read_header`, and the metadata."""
    header = _parse(path, text[LENGTH_BYTES:])
    metadata = header.pop("__metadata__", None)
    entries = {
        name: _entry(path, name, fields, len(text), state) for name, fields in header.items()
    }
    _check_layout(path, entries, len(text), state.size_bytes - len(text))
    return entries, metadata if isinstance(metadata, dict) else {}


def check_weight_file(path: Path) -> int:
    """Return the size in bytes of a weight file that could be read.

    Raises:
        CheckpointError: it is missing, not a regular file, or empty.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file. Put the weight file itself there.")
    if status.st_size == 0:
        raise CheckpointError(f"{path} is empty: a download that never finished. {AGAIN}.")
    return status.st_size


def lfs_pointer(path: Path) -> CheckpointError:
    """The error to raise for a Git-LFS pointer that lies where weights should be."""
    return CheckpointError(
        f"{path} is a Git-LFS pointer, not the weights. Run `git lfs pull` in its folder, "
        "or download the model with huggingface_hub."
    )


def _header_length(path: Path, file: BinaryIO, file_bytes: int) -> int:
    prefix = file.read(LENGTH_BYTES)
    if prefix == LFS_PREFIX[:LENGTH_BYTES] and (prefix + file.read(64)).startswith(LFS_PREFIX):
        raise lfs_pointer(path)
    length = int.from_bytes(prefix, "little")
    if MAX_HEADER_BYTES < length < file_bytes:
        raise CheckpointError(
            f"{path} has a header of {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read. "
            f"{AGAIN}, or save the model in several files."
        )
    if len(prefix) < LENGTH_BYTES or length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is not a safetensors file: its first {LENGTH_BYTES} bytes are not the "
            f"length of a header. {AGAIN}, or check that it was saved as safetensors."
        )
    if LENGTH_BYTES + length > file_bytes:
        raise CheckpointError(
            f"{path} is truncated: its header alone should take {length:,} bytes, the whole "
            f"file has {file_bytes:,}. {AGAIN}."
        )
    return length


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a corrupt header ({error}). {AGAIN}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a corrupt header (not a JSON object). {AGAIN}.")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(
            f"{path} has a corrupt header ({len(header):,} tensors, at most {MAX_TENSORS:,} are "
            f"read). {AGAIN}, or save the model in several files."
        )
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{short(twice)} occurs twice")
    return fields


def _entry(path: Path, name: str, fields: Any, data_start: int, state: FileState) -> TensorEntry:
    """One entry of the header, checked in itself."""

    def corrupt(why: str) -> CheckpointError:
        return CheckpointError(f"{path}: the header's entry for tensor {name!r} {why}. {AGAIN}.")

    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise corrupt("lacks dtype, shape or data_offsets")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise corrupt(f"has a shape that is none: {short(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt(f"has data_offsets that are no range: {short(offsets)}")
    dtype = DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {short(fields['dtype'])}, which torch "
            f"{torch.__version__} does not have or tl_fastload does not read. Update torch, or "
            f"convert the checkpoint to one of {', '.join(DTYPES)}."
        )
    begin, end = offsets
    expected_bytes = math.prod(shape) * compat.item_bytes(dtype)
    if end - begin != expected_bytes:
        raise corrupt(
            f"has {end - begin:,} bytes of data where dtype {fields['dtype']} and shape "
            f"{short(shape)} need {expected_bytes:,}"
        )
    return TensorEntry(name, dtype, tuple(shape), path, data_start + begin, expected_bytes, state)


def _are_sizes(value: Any) -> bool:
    """Whether `value` is a list of integers that a file or a shape can have."""
    # `type` and not isinstance: JSON's true would pass as the integer 1.
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size <= MAX_DIMENSION for size in value
    )


def _check_layout(
    path: Path, entries: Mapping[str, TensorEntry], data_start: int, data_bytes: int
) -> None:
    """The tensors must cover the data from end to end, as the format demands."""
    covered = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != covered:
            fault = "overlaps another" if entry.offset < covered else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: the data of tensor {entry.name!r} {fault} (byte {entry.offset:,}, "
                f"expected {covered:,}): the header is corrupt. {AGAIN}."
            )
        covered += entry.nbytes
    named_bytes = covered - data_start
    if named_bytes > data_bytes:
        raise CheckpointError(
            f"{path} is truncated: its header names {named_bytes:,} bytes of tensors, the file "
            f"holds {data_bytes:,}. {AGAIN}."
        )
    if named_bytes < data_bytes:
        raise CheckpointError(
            f"{path} holds {data_bytes - named_bytes:,} bytes that no tensor in its header owns: "
            f"the header is corrupt or two files were mixed. {AGAIN}."
        )
