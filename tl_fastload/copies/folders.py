"""Folders that appear whole or not at all: written beside their place, synced, then renamed.

The name of a working folder says which process made it, so that what a killed process leaves is
known and removed. No locks: whoever renames first has made the folder.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_MARK = "tl_fastload"
_OWNER = r"([0-9a-f]{8})-(\d+)-[0-9a-f]{8}"
_WORKING = re.compile(rf"\.{_MARK}-{_OWNER}$")
_PAYLOAD = re.compile(rf"(?:weights|tokenizer)-{_OWNER}(?:-\d+\.safetensors)?$")
_FORGOTTEN_SECONDS = 24 * 3600
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM)


@contextmanager
def working_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, on the same file system; removed at the end, whatever happens.

    What killed processes left beside `target` is removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent, target.name)
    folder = target.parent / f".{target.name}.{_MARK}-{new_owner()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(
    folder: Path, target: Path, *, last: str, old: Callable[[], Collection[str]], keep: bool = False
) -> bool:
    """Make a finished folder appear at `target`.

    Where nothing is, this is one rename. A folder that is there already gets
    the new files one by one, under names of their own, then `last` in one step, and then loses the
    old files: whenever the process ends, `last` names files that are there.

    Args:
        folder: the finished folder; everything in it is synced to the disk.
        target: where it goes.
        last: the file that names the others.
        old: names in `target` that the `last` there names; asked just before it is replaced.
        keep: leave a `target` that has a `last` already alone.

    Returns:
        Whether the folder was put there; False only with `keep`.
    """
    for path in (*folder.rglob("*"), folder):
        sync(path)
    if not _rename(folder, target):
        if keep and (target / last).is_file():
            return False
        _merge(folder, target, last, old)
    # It is there: nothing that fails from here on may look as if it were not.
    with contextlib.suppress(OSError):
        sync(target.parent)
    return True


def _rename(folder: Path, target: Path) -> bool:
    """False where a folder is: an empty one may be the directory that somebody works in."""
    if target.is_dir():
        return False
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in _TAKEN or not target.is_dir():
            raise
        return False
    return True


def _merge(folder: Path, target: Path, last: str, old: Callable[[], Collection[str]]) -> None:
    moved: list[Path] = []
    try:
        for path in folder.iterdir():
            if path.name != last:
                path.rename(target / path.name)
                moved.append(target / path.name)
        sync(target)
        replaced = set(old())
        (folder / last).replace(target / last)
    except BaseException:
        if (folder / last).exists():  # an interrupt may come just after the replacement
            for path in moved:
                remove(path)
        raise
    with contextlib.suppress(OSError):  # the new copy is there, whatever becomes of the old one
        sync(target)
        _remove_old(target, replaced, {path.name for path in moved})


def _remove_old(target: Path, replaced: Collection[str], new: Collection[str]) -> None:
    for path in list(target.iterdir()):
        found = _PAYLOAD.match(path.name)
        if found is None or path.name in new:
            continue
        own = found.group(2) == str(os.getpid())
        if path.name in replaced or own or _is_abandoned(path, *found.groups()):
            remove(path)


OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def only_mine_to_write(folder: Path) -> None:
    """Take the permission to write to a folder and all in it from everybody else, whatever the
    process lets its files have.
    """
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            with contextlib.suppress(OSError):  # a file system without permissions
                path.chmod(path.stat().st_mode & ~OTHERS_WRITE)


def is_planted(path: Path) -> bool:
    """Whether a path is a link that another user made: what is written there would go where they
    want it.
    """
    try:
        return path.is_symlink() and not is_trusted(path)
    except OSError:
        return False


def is_trusted(path: Path, *, forbidden_modes: int = 0) -> bool:
    """Whether a file, folder or link belongs to this user or to root, and to nobody else by its
    mode. Where users have no numbers (Windows), everything is.

    Args:
        path: not followed, if it is a link.
        forbidden_modes: such as `stat.S_IWOTH`: permissions that nobody may have; links have none.

    Raises:
        OSError: it is not there.
    """
    if not hasattr(os, "geteuid"):
        return True
    status = path.lstat()
    allows = 0 if stat.S_ISLNK(status.st_mode) else status.st_mode & forbidden_modes
    return status.st_uid in (os.geteuid(), 0) and not allows


def remove(path: Path) -> None:
    """Remove a file, or a folder and all in it; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_whole(folder: Path) -> None:
    """Remove a folder that others may be about to open: first its name, then what is in it."""
    away = folder.parent / f".{folder.name}.{_MARK}-{new_owner()}"
    with contextlib.suppress(OSError):
        folder.rename(away)
        remove(away)


def remove_abandoned(parent: Path, name: str = "") -> None:
    """Remove the working folders that killed processes left in a folder.

    Args:
        parent: the folder.
        name: of the target that they were for; "" for any.
    """
    with contextlib.suppress(OSError):
        for path in parent.iterdir():
            found = _WORKING.search(path.name)
            ours = found is not None and (not name or path.name[1 : found.start()] == name)
            if found is not None and ours and _is_abandoned(path, found.group(1), found.group(2)):
                remove(path)


def is_working(path: Path) -> bool:
    """Whether a folder is one that a process works in, or left behind."""
    return _WORKING.search(path.name) is not None


def _is_abandoned(path: Path, machine: str, process: str) -> bool:
    if machine == _machine():
        return not psutil.pid_exists(int(process))
    # Another machine's processes cannot be seen: only time tells.
    try:
        return time.time() - path.lstat().st_mtime > _FORGOTTEN_SECONDS
    except OSError:  # that machine has just removed it
        return False


def new_owner() -> str:
    """A name that no other save has, and that says which process made it."""
    return f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"


@functools.cache
def _machine() -> str:
    """A name for where process numbers mean the same: the host, and on Linux the container."""
    where = socket.gethostname()
    with contextlib.suppress(OSError):
        where += str(Path("/proc/self/ns/pid").stat().st_ino)
    return hashlib.sha256(where.encode()).hexdigest()[:8]


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
