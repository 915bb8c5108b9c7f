"""A load through the cache: the entry that is there, or one that is filled with what was loaded."""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_fastload.copies.cache import (
    BAD_ENTRY,
    entry_for,
    folder_for,
    hit_request,
    why_not_kept,
    why_not_trusted,
)
from tl_fastload.copies.folders import remove_whole
from tl_fastload.copies.manifest import MANIFEST
from tl_fastload.copies.read import load_copy
from tl_fastload.copies.write import write_copy
from tl_fastload.errors import LeanLoadError, SaveError
from tl_fastload.ground.boundary import boundary
from tl_fastload.loading import load
from tl_fastload.printable import printable
from tl_fastload.request.contradictions import check_usable, device_asked_for
from tl_fastload.roads.road import Request

_NOT_SHARED = (
    "not used: entries are of whole models. Save a copy in one process (save_lean), and load its "
    "folder with mesh=."
)


def load_through_cache(request: Request) -> Any:
    """Load a model: a processed copy as it is, anything else through the cache if there is one.

    Args:
        request: the call, resolved.

    Raises:
        ArgumentError: CUDA is there and answers nothing, such as in a forked process.
    """
    device = device_asked_for(request.arguments)
    if device.type == "cuda" and request.options.device_map is None:
        check_usable(device, f"device={str(device)!r}")  # before a converter makes zeros there
    if request.copy is not None:
        return load_copy(request, request.copy)
    if request.options.mesh is not None:
        model = load.load(request)
        is_wanted = folder_for(request.options.cache) is not None
        return _told(model, _NOT_SHARED) if is_wanted else model
    folder = entry_for(request)
    if folder is None:
        model = load.load(request)
        is_wanted = folder_for(request.options.cache) is not None
        reason = why_not_kept(request.arguments) if is_wanted else None
        return model if reason is None else _told(model, f"not filled: {reason}")
    suspect = why_not_trusted(folder)
    if suspect is not None:
        text = f"The cache's entry {folder} is not used: {suspect}."
        warnings.warn(printable(f"{text} The model is loaded anew."), stacklevel=3)
        if _is_mine(folder):
            remove_whole(folder)
    model = None if suspect else _hit(request, folder)
    if model is None:
        model = load.load(request)
        there = suspect is not None and os.path.lexists(folder)
        _told(model, f"not filled: {suspect}" if there else _fill(request, model, folder))
    return model


def _is_mine(folder: Path) -> bool:
    try:
        return not folder.is_symlink() and folder.lstat().st_uid == os.geteuid()
    except (OSError, AttributeError):
        return False


def _hit(request: Request, folder: Path) -> Any | None:
    """The model from its entry; None if there is none, or a damaged one, which is removed."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        with boundary("while loading from the cache"):
            model = load_copy(hit_request(request), folder)
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


def _fill(request: Request, model: Any, folder: Path) -> str:
    """Save a model as an entry; what the report says of it. A failure is no error of the load."""
    own_tokenizer = request.arguments["tokenizer"] is None
    try:
        with boundary("while filling the cache", SaveError):
            made = write_copy(model, folder, tokenizer=own_tokenizer, for_cache=True)
    except LeanLoadError as error:
        return f"not filled: {error}"
    return f"filled: {folder}" if made else f"filled by another process: {folder}"


def _told(model: Any, text: str) -> Any:
    model.load_report = replace(model.load_report, cache=text)
    return model
