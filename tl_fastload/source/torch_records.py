"""Whether each record of a torch zip archive is as long as the tensors that lie in it need.

torch does not ask: mapped, a short record goes on with the bytes behind it, and a compressed one is
inflated first. What a file declares is read here from its directory and its pickle; nothing is
inflated but the pickle, and no code of it is run.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from tl_fastload.errors import CheckpointError

MAX_PICKLE_BYTES = 64 << 20
"""Of the part that names the tensors; 100,000 of them take 20 MB."""
_AGAIN = "Download or copy the file again"
_LOCAL_HEADER_BYTES = 30
_ITEM_BYTES = {
    "UntypedStorage": 1,
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage"), 1),
    **dict.fromkeys(("QInt8Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"), 1),
    **dict.fromkeys(("ShortStorage", "HalfStorage", "BFloat16Storage"), 2),
    **dict.fromkeys(("IntStorage", "FloatStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("LongStorage", "DoubleStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}
"""Of an element, by the class that torch's pickles name; newer dtypes have UntypedStorage."""
_NAME_LENGTHS = slice(26, 30)


class _Inert:
    """Stands for whatever a pickle names: takes everything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    # As of a list, a set, a table, or an object with a state.
    append = extend = add = __setitem__ = __setstate__ = __call__


class _Reader(pickle.Unpickler):
    """Collects what a pickle says of its storages: name of the record -> bytes."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.sizes: dict[str, int] = {}
        self.contradicts: str | None = None

    def find_class(self, module: str, name: str) -> Any:
        """A class of its own for each name, so that `persistent_load` can ask for it."""
        return type(name, (_Inert,), {"__module__": module})

    def persistent_load(self, pid: Any) -> Any:
        """Note a storage: ("storage", its class, record, device, elements)."""
        _, kind, record, _, elements = pid
        size_bytes = elements * _item_bytes(kind.__name__)
        if self.sizes.setdefault(str(record), size_bytes) != size_bytes:
            self.contradicts = str(record)
        return _Inert()


def _item_bytes(storage: str) -> int:
    if storage not in _ITEM_BYTES:
        raise ValueError(f"a storage of the kind {storage!r}")
    return _ITEM_BYTES[storage]


def check_records(path: Path, file: BinaryIO) -> bool:
    """Compare the records of a zip archive with what its pickle says of them.

    Args:
        path: for messages.
        file: the archive, open.

    Returns:
        Whether every record lies in the file as it is, not compressed.

    Raises:
        CheckpointError: the archive is corrupt, or a record is too short or too long.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _check(path, file, archive)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is a corrupt zip archive ({error}). {_AGAIN}.") from error


def inflated_bytes(file: BinaryIO) -> int:
    """Bytes of all records of an archive, as its directory declares them."""
    with zipfile.ZipFile(file) as archive:
        return sum(item.file_size for item in archive.infolist())


def _check(path: Path, file: BinaryIO, archive: zipfile.ZipFile) -> bool:
    items = archive.infolist()
    by_name = {item.filename: item for item in items}
    if len(by_name) < len(items):
        raise ValueError("two of its records have one name")
    pickles = [name for name in by_name if name.rpartition("/")[2] == "data.pkl"]
    is_stored = all(item.compress_type == zipfile.ZIP_STORED for item in items)
    if len(pickles) != 1:  # torch says what it is instead
        return is_stored
    sizes = _declared(path, archive, by_name[pickles[0]])
    folder = pickles[0].removesuffix("data.pkl") + "data/"
    end = file.seek(0, io.SEEK_END)
    for record, needed in (sizes or {}).items():
        item = by_name.get(folder + record)
        held = 0 if item is None else item.file_size
        if item is None or held != needed:
            raise CheckpointError(
                f"{path}: the record {record} holds {held:,} bytes, its tensors need {needed:,}. "
                f"The file is cut off or damaged. {_AGAIN}."
            )
        if item.compress_type == zipfile.ZIP_STORED and _end_of(file, item) > end:
            raise CheckpointError(f"{path}: the record {record} leads out of the file. {_AGAIN}.")
    return is_stored


def _end_of(file: BinaryIO, item: zipfile.ZipInfo) -> int:
    """The byte after a record that is not compressed."""
    file.seek(item.header_offset)
    lengths = file.read(_LOCAL_HEADER_BYTES)[_NAME_LENGTHS]
    name_bytes, extra_bytes = (int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2))
    return item.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes + item.file_size


def _declared(path: Path, archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> dict[str, int] | None:
    """What the pickle says of its records; None for one that torch refuses for what it names."""
    if item.file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path}: the part that names its tensors has {item.file_size:,} bytes, at most "
            f"{MAX_PICKLE_BYTES:,} are read. {_AGAIN}, or save the bare state_dict()."
        )
    try:
        reader = _Reader(io.BytesIO(archive.read(item)))
        reader.load()
    except MemoryError:
        raise
    except Exception as error:  # a corrupt pickle can raise anything at all
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if reader.contradicts is not None:
        raise ValueError(f"it contradicts itself about the record {reader.contradicts}")
    return reader.sizes
