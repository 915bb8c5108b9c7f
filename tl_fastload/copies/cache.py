"""The cache of processed copies: its folder, its entries, which of them a load may use."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tl_fastload.copies.contents import open_copy
from tl_fastload.copies.folders import (
    OTHERS_WRITE,
    is_trusted,
    is_working,
    remove_abandoned,
    remove_whole,
)
from tl_fastload.copies.key import entry_name
from tl_fastload.copies.manifest import MANIFEST, Manifest, is_copy
from tl_fastload.errors import (
    ArgumentError,
    CheckpointError,
    InternalError,
    LeanLoadError,
    QuantizationError,
)
from tl_fastload.ground.boundary import boundary, guarded
from tl_fastload.ground.paths import expanded_to_write
from tl_fastload.request.argument_types import checked
from tl_fastload.request.contradictions import CHECKPOINT_ARGUMENTS
from tl_fastload.request.keywords import Keywords
from tl_fastload.request.options import DEFAULT_DTYPE
from tl_fastload.roads.road import Request

VARIABLE = "TL_FASTLOAD_CACHE"
_ON = ("1", "true", "yes", "on")
_OFF = ("", "0", "false", "no", "off")
BAD_ENTRY = (CheckpointError, QuantizationError, InternalError)
"""What a damaged entry raises; a load then goes to the checkpoint itself."""
_DAY_SECONDS = 24 * 3600


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
        return expanded_to_write(named)
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
    return expanded_to_write(cache)


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
                found.append(_entry(path, open_copy(path).manifest))
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


def is_usable(folder: Path) -> bool:
    """Whether there is an entry in a folder that `entry_for` names, and a load would take it."""
    return is_copy(folder) and why_not_trusted(folder) is None


def why_not_trusted(folder: Path) -> str | None:
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


def entry_for(request: Request) -> Path | None:
    """The folder of the cache entry that a load would use, whether it is there or not; None for a
    load without a cache, or of a copy.

    Args:
        request: the call, resolved.
    """
    home = None if request.copy is not None else folder_for(request.options.cache)
    if home is None or why_not_kept(request.arguments) is not None:
        return None
    return home / entry_name(request)


def hit_request(request: Request) -> Request:
    """How a load that hits the cache loads the entry: what its name stands for need not be
    compared with what is in it.
    """
    keywords = Keywords(trust_remote_code=request.keywords.trust_remote_code)
    changed = request.changed(dtype=DEFAULT_DTYPE, first_n_layers=None, n_ctx=None)
    plain = changed.with_options(quantize=None, dequantize=False, adapter=())
    return replace(plain, keywords=keywords)


def why_not_kept(arguments: dict[str, Any]) -> str | None:
    """Why a load cannot be known again by its files."""
    if arguments["hf_model"] is not None:
        return "hf_model= has no files to know it by"
    given = [name for name in CHECKPOINT_ARGUMENTS if arguments[name] is not None]
    return f"{given[0]}= names a branch, which may move" if given else None


def _home(folder: str | Path | None) -> Path:
    if folder is None:
        return default_folder()
    checked(folder=folder)
    return expanded_to_write(folder)


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
