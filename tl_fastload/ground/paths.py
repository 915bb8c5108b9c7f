"""Paths as people write them, which may be none at all: `os.path` says no of what is too long or
too odd to be one, where `Path` raises. Files that are written whole or not at all.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tl_fastload.errors import ArgumentError, LeanLoadError


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with "~" written out; as it is, where "~somebody" has no home here."""
    return Path(os.path.expanduser(Path(path)))  # noqa: PTH111


def expanded_to_write(
    path: str | os.PathLike[str], error: type[LeanLoadError] = ArgumentError
) -> Path:
    """`expanded`, of a folder that may be made: "~somebody" would be one in the current folder.

    Raises:
        LeanLoadError: of that kind; somebody has no home here.
    """
    found = expanded(path)
    if str(found).startswith("~"):
        raise error(f"{path}: nobody of that name has a home here. Write the path out.")
    return found


def exists(path: Path) -> bool:
    """Whether something is there."""
    return os.path.exists(path)  # noqa: PTH110


def is_directory(path: Path) -> bool:
    """Whether a folder is there."""
    return os.path.isdir(path)  # noqa: PTH112


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under another name, and give it its own when it is whole.

    Args:
        path: of the file; what lies there is replaced.
        write: writes what is in it.

    Raises:
        ArgumentError: it cannot be written.
    """
    # A name that nobody can have put a link at, and "x", which follows none.
    partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            write(file)
        partial.replace(path)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be written ({error.strerror}).") from error
    finally:
        partial.unlink(missing_ok=True)
