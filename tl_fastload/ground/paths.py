"""Paths as people write them, which may be none at all: `os.path` says no of what is too long or
too odd to be one, where `Path` raises.
"""

from __future__ import annotations

import os
from pathlib import Path

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
