"""The files of a processed copy: opened, and compared with their checksums."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tl_fastload.errors import CheckpointError
from tl_fastload.reader import FileReader
from tl_fastload.safetensors_header import TensorEntry
from tl_fastload.store_format import Manifest, read_manifest, stored_tensors

_CHUNK_BYTES = 8 << 20


def open_copy(folder: Path) -> tuple[Manifest, dict[str, TensorEntry]]:
    """The JSON and the headers of a copy; read again if another process has just replaced it.

    Raises:
        CheckpointError: the copy is damaged, or this version cannot read it.
    """
    manifest = read_manifest(folder)
    try:
        return manifest, stored_tensors(folder, manifest)
    except CheckpointError:
        again = read_manifest(folder)
        if again.copy_id == manifest.copy_id:
            raise
        return again, stored_tensors(folder, again)


def verify_copy(folder: str | os.PathLike[str]) -> None:
    """Read every byte of a processed copy and compare it with the checksums of when it was saved.

    Sizes, headers and the JSON are compared whenever a copy is loaded; this is for the rest.

    Args:
        folder: as passed to `save_lean`.

    Raises:
        CheckpointError: a file is missing, cut off or altered; names the tensor at fault.
    """
    place = Path(folder).expanduser()
    manifest = read_manifest(place)
    entries = stored_tensors(place, manifest)
    reader = FileReader()
    try:
        for key, wanted in manifest.checksums.items():
            if _digest(reader, entries[key]) != wanted:
                raise CheckpointError(
                    f"{entries[key].path}: the bytes of {key} are not those that were saved. Save "
                    "the copy again, or load the original."
                )
    finally:
        reader.close()


def _digest(reader: FileReader, entry: TensorEntry) -> str:
    digest = hashlib.sha256()
    end = entry.offset + entry.nbytes
    for first in range(entry.offset, end, _CHUNK_BYTES):
        piece = reader.scratch(entry.path, first, min(first + _CHUNK_BYTES, end))
        digest.update(memoryview(piece.numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
