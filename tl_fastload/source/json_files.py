"""The one reader of JSON: a regular file of bounded size, with an object in it that is not nested
deeper than any real one.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tl_fastload.errors import CheckpointError, LeanLoadError

MAX_BYTES = 64 << 20
"""Of a JSON file; the largest index that is known has 10 MB."""
MAX_DEPTH = 64
_LFS_PREFIX = b"version https://git-lfs"


def open_regular(path: Path) -> int:
    """A descriptor for reading a regular file; pipes and devices are not even waited for.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    # Without O_NONBLOCK, opening a pipe waits for somebody to write into it.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except ValueError as error:  # a null byte in the name
        raise OSError(str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return descriptor


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a small regular file.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than `max_bytes`.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > max_bytes:
            raise OSError(f"{size_bytes:,} bytes are too many, at most {max_bytes:,} are read")
        return file.read(max_bytes)


def read_object(
    path: Path,
    remedy: str,
    *,
    kind: type[LeanLoadError] = CheckpointError,
    cannot_read: Callable[[OSError], LeanLoadError] | None = None,
) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        remedy: one sentence that says what to do if it is damaged.
        kind: of the errors.
        cannot_read: makes the error for a file that the system will not let us read.

    Raises:
        LeanLoadError: of that kind; the file cannot be read, or holds something else.
    """
    try:
        text = read_bytes(path)
    except OSError as error:
        if cannot_read is not None:
            raise cannot_read(error) from error
        raise kind(f"Cannot read {path}: {error.strerror or error}. {remedy}") from error
    if text.startswith(_LFS_PREFIX):
        raise kind(
            f"{path} is a Git-LFS pointer, not the file itself. Run `git lfs pull` in its folder, "
            "or download the model with huggingface_hub."
        )
    return parse_object(text, str(path), remedy, kind=kind)


def parse_object(
    text: bytes, label: str, remedy: str, *, kind: type[LeanLoadError] = CheckpointError
) -> dict[str, Any]:
    """The JSON object in a text.

    Args:
        text: UTF-8.
        label: where it comes from, for messages.
        remedy: one sentence that says what to do if it is damaged.
        kind: of the errors.

    Raises:
        LeanLoadError: of that kind; it is something else, or nested too deeply, or has a NaN.
    """
    try:
        value = json.loads(text.decode("utf-8"), parse_constant=_constant)
        _check_depth(value)
    except RecursionError as error:
        raise kind(f"{label} is not valid JSON (nested too deeply). {remedy}") from error
    except ValueError as error:
        raise kind(f"{label} is not valid JSON ({error}). {remedy}") from error
    if not isinstance(value, dict):
        raise kind(f"{label} holds a {type(value).__name__}, not a JSON object. {remedy}")
    return value


def short(value: Any, most: int = 80) -> str:
    """A value for a message, whatever it is."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested deeply; an integer of thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= most else text[: most - 3] + "..."


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN stands where a number belongs")
    return float(name)  # bounds may be infinite


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        members = (_members(outer) for outer in level)
        level = [inner for some in members for inner in some if isinstance(inner, (dict, list))]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
