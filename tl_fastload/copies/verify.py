"""The files of a processed copy: opened, and compared with their checksums."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_fastload.copies.contents import open_copy
from tl_fastload.copies.schema import REMEDY
from tl_fastload.errors import CheckpointError
from tl_fastload.ground.boundary import guarded
from tl_fastload.ground.paths import expanded
from tl_fastload.request.argument_types import checked
from tl_fastload.source.reader import FileReader
from tl_fastload.source.safetensors import TensorEntry

_CHUNK_BYTES = 8 << 20


def tokenizer_digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a tokenizer's folder, by its path in there."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_tokenizer(folder: Path, saved: Mapping[str, Any]) -> None:
    """Compare a copy's tokenizer with what was saved: one that is only a little damaged gives
    other tokens.

    Raises:
        CheckpointError: a file is missing or altered.
    """
    home = folder / saved["folder"]
    there = tokenizer_digests(home)
    for name, wanted in saved.get("files", {}).items():  # earlier copies have no digests
        if there.get(name) != wanted:
            raise CheckpointError(
                f"{home / name}: the tokenizer's file is "
                f"{'not the one that was saved' if name in there else 'missing'}. Save the copy "
                "again, or pass tokenizer=."
            )


@guarded("while verifying a copy")
def verify_copy(folder: str | os.PathLike[str]) -> None:
    """Read every byte of a processed copy and compare it with the checksums of when it was saved.

    Sizes, headers and the JSON are compared whenever a copy is loaded; this is for the rest.

    Args:
        folder: as passed to `save_lean`.

    Raises:
        CheckpointError: a file is missing, cut off or altered; names the tensor at fault.
        ArgumentError: `folder` is no path.
    """
    checked(folder=folder)
    place = expanded(Path(folder))
    contents = open_copy(place)
    manifest, entries = contents.manifest, contents.entries
    with contextlib.closing(FileReader()) as reader:
        reader.files.expect({e.path: e.state for e in entries.values() if e.state is not None})
        for key, wanted in manifest.checksums.items():
            if _digest(reader, entries[key]) != wanted:
                raise CheckpointError(
                    f"{entries[key].path}: the bytes of {key} are not those that were saved. "
                    f"{REMEDY}"
                )
        reader.files.check_all()
    if manifest.tokenizer is not None:
        check_tokenizer(place, manifest.tokenizer)


def _digest(reader: FileReader, entry: TensorEntry) -> str:
    digest = hashlib.sha256()
    end = entry.offset + entry.nbytes
    for first in range(entry.offset, end, _CHUNK_BYTES):
        piece = reader.scratch(entry.path, first, min(first + _CHUNK_BYTES, end))
        digest.update(memoryview(piece.numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
