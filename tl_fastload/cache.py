"""Processed copies kept by themselves: `from_pretrained_lean(name, cache=True)`.

An entry is a processed copy in a folder named by a hash of everything that has a say in the
numbers, so that nothing stale can be found. Entries appear whole, by renaming: two processes that
fill one at the same time both go on, and one copy stays.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tl_fastload.copies.folders import (
    OTHERS_WRITE,
    is_trusted,
    is_working,
    remove_abandoned,
    remove_whole,
)
from tl_fastload.copies.key import entry_name
from tl_fastload.copies.manifest import (
    MANIFEST,
    Manifest,
    is_copy,
    read_manifest,
    stored_tensors,
)
from tl_fastload.copies.read import copy_folder, load_copy
from tl_fastload.copies.write import write_copy
from tl_fastload.errors import (
    ArgumentError,
    CheckpointError,
    InternalError,
    LeanLoadError,
    QuantizationError,
    SaveError,
)
from tl_fastload.ground.boundary import boundary, guarded
from tl_fastload.loading import checks, load
from tl_fastload.printable import printable
from tl_fastload.request.argument_types import checked
from tl_fastload.request.options import DEFAULT_DTYPE, Options

VARIABLE = "TL_FASTLOAD_CACHE"
_ON = ("1", "true", "yes", "on")
_OFF = ("", "0", "false", "no", "off")
BAD_ENTRY = (CheckpointError, QuantizationError, InternalError)
"""What a damaged entry raises; a load then goes to the checkpoint itself."""
_DAY_SECONDS = 24 * 3600
_CHECKPOINTS = ("checkpoint_index", "checkpoint_value", "checkpoint_label")


@dataclass(frozen=True)
class Entry:
    """One processed copy in the cache.

    Attributes:
        folder: where it lies; `from_pretrained_lean(folder)` loads it.
        source: the folder or hub name that it was loaded from.
        revision: the hub commit of the source.
        dtype: of the parameters, such as "bfloat16".
        processing: the processing steps that were asked for.
        quantization: "int8", "nf4" or "fp4"; None for a model without.
        size_bytes: of all its files.
        last_used: when it was filled or loaded last, in seconds since the epoch.
    """

    folder: Path
    source: str | None
    revision: str | None
    dtype: str
    processing: tuple[str, ...]
    quantization: str | None
    size_bytes: int
    last_used: float


def default_folder() -> Path:
    """The folder of `cache=True`: what TL_FASTLOAD_CACHE names, else the user's cache folder."""
    named = os.environ.get(VARIABLE, "")
    if named.lower() not in (*_ON, *_OFF):
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "tl_fastload"


def folder_for(cache: bool | str | Path | None) -> Path | None:
    """The cache folder that an argument `cache=` means; None for no cache.

    None means no cache unless TL_FASTLOAD_CACHE names a folder or says 1.
    """
    if cache is None:
        cache = os.environ.get(VARIABLE, "").lower() not in _OFF
    if isinstance(cache, bool):
        return default_folder() if cache else None
    if not str(cache):
        raise ArgumentError('cache="" names no folder: pass True for the usual one.')
    return Path(cache).expanduser()


@guarded("while looking after the cache")
def entries(folder: str | Path | None = None) -> list[Entry]:
    """Every whole copy in a cache folder, the one used last first.

    Args:
        folder: of the cache; None for `default_folder()`.
    """
    found = []
    for path in _copies(_home(folder)):
        try:
            with boundary("while looking at a cache entry"):
                manifest = read_manifest(path)
                stored_tensors(path, manifest)
                found.append(_entry(path, manifest))
        except LeanLoadError:  # damaged, or just being removed
            continue
    return sorted(found, key=lambda entry: -entry.last_used)


@guarded("while looking after the cache")
def size_bytes(folder: str | Path | None = None) -> int:
    """Bytes of all files in a cache folder, unfinished and damaged copies included."""
    return sum(_size_bytes(path) for path in _ours(_home(folder)))


@guarded("while looking after the cache")
def prune(
    folder: str | Path | None = None,
    *,
    max_bytes: int | None = None,
    unused_days: float | None = None,
) -> list[Path]:
    """Remove entries: damaged ones, what killed processes left, and as many as asked for.

    Models that are mapped from a removed entry go on working.

    Args:
        folder: of the cache; None for `default_folder()`.
        max_bytes: keep the entries used last, up to this size together.
        unused_days: remove entries that were not used for so long.

    Returns:
        The folders that were removed.
    """
    checked(max_bytes=max_bytes, unused_days=unused_days)
    home = _home(folder)
    remove_abandoned(home)
    kept, kept_bytes = set(), 0
    for entry in entries(home):
        age_seconds = time.time() - entry.last_used
        is_old = unused_days is not None and age_seconds > unused_days * _DAY_SECONDS
        if is_old or (max_bytes is not None and kept_bytes + entry.size_bytes > max_bytes):
            continue
        kept.add(entry.folder)
        kept_bytes += entry.size_bytes
    removed = [path for path in _copies(home) if path not in kept]
    for path in removed:
        remove_whole(path)
    return removed


@guarded("while looking after the cache")
def clear(folder: str | Path | None = None) -> list[Path]:
    """Remove every entry of a cache folder.

    Args:
        folder: of the cache; None for `default_folder()`.

    Returns:
        The folders that were removed.
    """
    return prune(folder, max_bytes=-1)


def load_through_cache(
    cls: type, options: Options, arguments: dict[str, Any], keywords: dict[str, Any]
) -> Any:
    """Load a model: a processed copy as it is, anything else through the cache if there is one.

    Args:
        cls: the model class, with `LeanLoadingMixin` among its bases.
        options: strategy, mapping, progress, cache.
        arguments: of `from_pretrained`.
        keywords: for Hugging Face.
    """
    options.check()
    copy = copy_folder(arguments["model_name"], keywords)
    if copy is not None:
        return load_copy(cls, options, arguments, keywords, copy)
    folder = entry_for(cls, options, arguments, keywords)
    if folder is None:
        model = load.load(cls, options, arguments, keywords)
        reason = _why_not(arguments) if folder_for(options.cache) is not None else None
        return model if reason is None else _told(model, f"not filled: {reason}")
    suspect = _why_not_trusted(folder)
    if suspect is not None:
        text = f"The cache's entry {folder} is not used: {suspect}."
        warnings.warn(printable(f"{text} The model is loaded anew."), stacklevel=3)
        if _is_mine(folder):
            remove_whole(folder)
    model = None if suspect else _hit(cls, options, arguments, keywords, folder)
    if model is None:
        model = load.load(cls, options, arguments, keywords)
        there = suspect is not None and os.path.lexists(folder)
        _told(model, f"not filled: {suspect}" if there else _fill(model, folder, arguments))
    return model


def is_usable(folder: Path) -> bool:
    """Whether there is an entry in a folder that `entry_for` names, and a load would take it."""
    return is_copy(folder) and _why_not_trusted(folder) is None


def _why_not_trusted(folder: Path) -> str | None:
    """Why an entry may be somebody else's doing; None for an entry that is not, or none at all.

    Who can write to a cache that is shared could put any weights under the name that is asked for.
    """
    if not os.path.lexists(folder):
        return None
    try:
        for path in (folder, folder.resolve(), *folder.rglob("*")):
            if not is_trusted(path):
                return f"{path} belongs to another user"
            if not is_trusted(path, forbidden_modes=OTHERS_WRITE):
                return f"others may write to {path}"
    except (OSError, RuntimeError):  # just being removed, or a circle of links
        return None
    return None


def _is_mine(folder: Path) -> bool:
    try:
        return not folder.is_symlink() and folder.lstat().st_uid == os.geteuid()
    except (OSError, AttributeError):
        return False


def entry_for(
    cls: type, options: Options, arguments: dict[str, Any], keywords: dict[str, Any]
) -> Path | None:
    """The folder of the cache entry that a load would use, whether it is there or not; None for a
    load without a cache. The arguments are those of `load_through_cache`.
    """
    home = folder_for(options.cache)
    if home is None or _why_not(arguments) is not None:
        return None
    checks.check_arguments(arguments, keywords)
    return home / entry_name(cls, options, arguments, keywords)


def hit_arguments(
    options: Options, arguments: dict[str, Any], keywords: dict[str, Any]
) -> tuple[Options, dict[str, Any], dict[str, Any]]:
    """How a load that hits the cache loads the entry: what its name stands for need not be
    compared with what is in it. The arguments are those of `load_through_cache`.
    """
    arguments = {**arguments, "dtype": DEFAULT_DTYPE, "first_n_layers": None, "n_ctx": None}
    keywords = {k: v for k, v in keywords.items() if k == "trust_remote_code"}
    return replace(options, quantize=None, dequantize=False, adapter=()), arguments, keywords


def _why_not(arguments: dict[str, Any]) -> str | None:
    """Why a load cannot be known again by its files."""
    if arguments["hf_model"] is not None:
        return "hf_model= has no files to know it by"
    given = [name for name in _CHECKPOINTS if arguments[name] is not None]
    return f"{given[0]}= names a branch, which may move" if given else None


def _hit(
    cls: type,
    options: Options,
    arguments: dict[str, Any],
    keywords: dict[str, Any],
    folder: Path,
) -> Any | None:
    """The model from its entry; None if there is none, or a damaged one, which is removed."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        with boundary("while loading from the cache"):
            model = load_copy(cls, *hit_arguments(options, arguments, keywords), folder)
    except BAD_ENTRY as error:
        warnings.warn(
            f"The cache entry {folder} cannot be used, and is filled again: {error}", stacklevel=2
        )
        with contextlib.suppress(OSError):  # of a cache that is only read
            remove_whole(folder)
        return None
    with contextlib.suppress(OSError):  # of a cache that is only read
        os.utime(folder / MANIFEST)
    return _told(model, f"hit: {folder}")


def _fill(model: Any, folder: Path, arguments: dict[str, Any]) -> str:
    """Save a model as an entry; what the report says of it. A failure is no error of the load."""
    own_tokenizer = arguments["tokenizer"] is None
    try:
        with boundary("while filling the cache", SaveError):
            made = write_copy(model, folder, tokenizer=own_tokenizer, for_cache=True)
    except LeanLoadError as error:
        return f"not filled: {error}"
    return f"filled: {folder}" if made else f"filled by another process: {folder}"


def _told(model: Any, text: str) -> Any:
    model.load_report = replace(model.load_report, cache=text)
    return model


def _home(folder: str | Path | None) -> Path:
    if folder is None:
        return default_folder()
    checked(folder=folder)
    return Path(folder).expanduser()


def _ours(home: Path) -> Iterator[Path]:
    """What this module put into a cache folder, whole or not."""
    with contextlib.suppress(OSError):
        for path in home.iterdir():
            if path.is_dir() and (is_copy(path) or is_working(path)):
                yield path


def _copies(home: Path) -> list[Path]:
    return [path for path in _ours(home) if not is_working(path)]


def _entry(path: Path, manifest: Manifest) -> Entry:
    return Entry(
        folder=path,
        source=manifest.source,
        revision=manifest.revision,
        dtype=str(manifest.configuration["dtype"]).removeprefix("torch."),
        processing=tuple(step for step, on in manifest.flags.items() if on),
        quantization=manifest.quantization.kind if manifest.quantization else None,
        size_bytes=_size_bytes(path),
        last_used=(path / MANIFEST).stat().st_mtime,
    )


def _size_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
