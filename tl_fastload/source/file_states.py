"""Whether the files of a load stay the same from its beginning to its end.

A file is known by its device, inode, size and time of change. What differs at a later look is one
error that says so: half of one checkpoint and half of another would be a model that nobody made.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tl_fastload.errors import CheckpointError
from tl_fastload.source.json_files import open_regular

_LOOK_SECONDS = 0.1  # so that an interrupt is never stuck in a wait, whatever the system
_TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True)
class FileState:
    """What a file was at one moment.

    Attributes:
        device: where it lies.
        inode: which file of that device it is; another one after a file was renamed over it.
        size_bytes: its length.
        changed_ns: when its bytes were written last, in nanoseconds.
    """

    device: int
    inode: int
    size_bytes: int
    changed_ns: int

    @classmethod
    def of(cls, file: int | str | Path) -> FileState:
        """The state of a path, or of an open descriptor.

        Raises:
            OSError: there is no such file.
        """
        found = os.fstat(file) if isinstance(file, int) else Path(file).stat()
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def state_of(path: Path) -> FileState:
    """What a file is now.

    Raises:
        CheckpointError: the system will not say.
    """
    try:
        return FileState.of(path)
    except OSError as error:
        raise unreadable(path, error) from error


def changed(path: Path) -> CheckpointError:
    """The error for a file that is another one than it was."""
    return CheckpointError(
        f"{path} changed while it was being loaded: it was written to, cut off, or another file "
        "took its place. Load it again when whoever writes it has finished."
    )


class OpenFiles:
    """The files of one load: open for reading, and what each was when it was looked at first."""

    def __init__(self) -> None:
        self._states: dict[Path, FileState] = {}
        self._descriptors: dict[Path, int] = {}
        self._idle = threading.Condition()
        self._readers = 0

    def see(self, path: Path) -> None:
        """Watch a file from now on, if it is there.

        Raises:
            CheckpointError: it is another one than at the look before.
        """
        with contextlib.suppress(OSError, ValueError):
            self.expect({path: FileState.of(path)})

    def expect(self, states: Mapping[Path, FileState]) -> None:
        """Watch files from an earlier look on.

        Raises:
            CheckpointError: a file is another one than at the look before.
        """
        for path, state in states.items():
            if self._states.setdefault(path, state) != state:
                raise changed(path)

    def hold(self, states: Mapping[Path, FileState]) -> None:
        """Watch files from an earlier look on, and keep them open: they are mapped already.

        Raises:
            CheckpointError: a file is another one than at the look before.
        """
        self.expect(states)
        for path in states:
            self.descriptor(path)

    def descriptor(self, path: Path) -> int:
        """A descriptor of a file, open until `close`.

        Raises:
            CheckpointError: the file cannot be opened, or is another one than it was.
        """
        with self._idle:
            if path not in self._descriptors:
                descriptor = self._open(path)
                self._descriptors[path] = descriptor
                self.expect({path: FileState.of(descriptor)})
            return self._descriptors[path]

    @contextlib.contextmanager
    def reading(self, path: Path) -> Iterator[int]:
        """A descriptor that stays open in this block, whatever other threads open meanwhile.

        Raises:
            CheckpointError: as `descriptor`.
        """
        with self._idle:
            descriptor = self.descriptor(path)
            self._readers += 1
        try:
            yield descriptor
        finally:
            with self._idle:
                self._readers -= 1
                self._idle.notify_all()

    def check_all(self) -> None:
        """Compare every file with what it was.

        A file that is open may have lost its name meanwhile: what was read is what it was. Of the
        others, the name must lead to the same file.

        Raises:
            CheckpointError: one is another.
        """
        for path, state in self._states.items():
            try:
                now = FileState.of(self._descriptors.get(path, path))
            except OSError as error:
                raise changed(path) from error
            if now != state:
                raise changed(path)

    def close(self) -> None:
        """Close the files, and forget what they were."""
        self._states.clear()
        self._close_descriptors()

    def _open(self, path: Path) -> int:
        try:
            try:
                return open_regular(path)
            except OSError as error:
                if error.errno not in _TOO_MANY_OPEN or not self._descriptors:
                    raise
            while self._readers:
                self._idle.wait(_LOOK_SECONDS)
            self._close_descriptors()  # they are opened again, and compared, when they are needed
            return open_regular(path)
        except OSError as error:
            raise unreadable(path, error) from error

    def _close_descriptors(self) -> None:
        descriptors, self._descriptors = self._descriptors, {}
        with contextlib.ExitStack() as all_of_them:  # also those behind one that fails
            for descriptor in descriptors.values():
                all_of_them.callback(os.close, descriptor)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error to raise for a file that the system will not let us read."""
    if isinstance(error, PermissionError):
        remedy = "Give yourself permission to read it (chmod u+r), or copy it elsewhere."
    elif isinstance(error, FileNotFoundError):
        remedy = "Download or copy the file again; if it is a link, what it points to is gone."
    elif error.errno in _TOO_MANY_OPEN:
        remedy = "Close other files, or allow more of them (`ulimit -n`)."
    elif error.errno is None:
        remedy = "Put the file itself there."
    else:
        remedy = "Check the disk, or copy the file elsewhere."
    return CheckpointError(f"Cannot read {path}: {error.strerror or error}. {remedy}")
