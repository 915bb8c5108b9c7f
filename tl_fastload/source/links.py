"""Links in a checkpoint's folder: which are followed, and which lead out of it and are not."""

from __future__ import annotations

import os
from pathlib import Path

from tl_fastload.errors import CheckpointError


def leads_out(folder: Path, name: str) -> bool:
    """Whether a file of a folder lies elsewhere, by a link that huggingface_hub did not make.

    The folder itself may be a link. One that leads nowhere, or in a circle, leads out of nothing.

    Args:
        folder: of the checkpoint.
        name: of the file, relative to it.
    """
    path = folder / name
    try:
        home, real = folder.resolve(), path.resolve()
        if real.is_relative_to(home) or not real.exists():
            return False
        if path.is_symlink():
            # A snapshot's links lead to the blobs beside it; where these lie in turn is the hub's
            # matter.
            blobs = [one.parent / "blobs" for one in home.parents if one.name == "snapshots"]
            target = Path(os.path.normpath(path.parent.resolve() / path.readlink()))
            return not any(target.is_relative_to(one) for one in blobs)
    except (OSError, ValueError, RuntimeError):  # a circle, or no path at all
        return False
    return True


def check_link(folder: Path, name: str) -> None:
    """Raise CheckpointError for a file of a folder that `leads_out`; nothing of it is read.

    The arguments are those of `leads_out`.
    """
    if leads_out(folder, name):
        path = folder / name
        raise CheckpointError(
            f"{path} is a link that leads out of its folder, to {path.resolve()}. Nothing was read "
            "from there. Put the file itself in the folder, or pass the folder that holds it."
        )


def check_all_links(folder: Path, *, skip: tuple[str, ...] = ()) -> None:
    """`check_link` for everything at the top of a folder, which another library reads files of.

    Args:
        folder: of the checkpoint.
        skip: endings of names that are not read.
    """
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.name.endswith(skip):
            check_link(folder, path.name)
