"""Files that are written whole or not at all."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tl_fastload.errors import ArgumentError


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
