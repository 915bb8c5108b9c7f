"""Paths as people write them, which may be none at all."""

from __future__ import annotations

import os
from pathlib import Path

from tl_fastload.errors import ArgumentError, LeanLoadError


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with "~" written out; as it is, where "~somebody" has no home here."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def expanded_to_write(
    path: str | os.PathLike[str], error: type[LeanLoadError] = ArgumentError
) -> Path:
    """`expanded`, of a folder that may be made: "~somebody" would be one in the current folder.

    Raises:
        LeanLoadError: of that kind; somebody has no home here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as unknown:
        raise error(
            f"{path}: nobody of that name has a home here. Write the path out."
        ) from unknown


def exists(path: Path) -> bool:
    """Whether something is there."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long or too odd to be a path
        return False


def is_directory(path: Path) -> bool:
    """Whether a folder is there."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long or too odd to be a path
        return False
