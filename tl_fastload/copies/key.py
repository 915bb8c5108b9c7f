"""The name of a cache entry: a hash of everything that has a say in the numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from tl_fastload.copies.manifest import FORMAT_VERSION, versions
from tl_fastload.ground.memory_orders import FORWARD
from tl_fastload.request.contradictions import device_asked_for
from tl_fastload.request.steps import STEPS
from tl_fastload.roads.road import Request
from tl_fastload.source.choose import read_index
from tl_fastload.source.links import check_link
from tl_fastload.source.location import Location

# Raised when loads of one model give other numbers than those of an earlier tl_fastload.
_NUMBERS = 2

# How a load goes, not what comes out of it.
_NOT_IN_THE_NUMBERS = (
    *("strategy", "mmap", "progress", "cache", "verify", "check_memory"),
    *("device_map", "max_memory", "mesh", "parallel"),
)
_IN_THE_COPY = ("first_n_layers", "n_ctx", "default_prepend_bos", "default_padding_side", *STEPS)


def entry_name(request: Request) -> str:
    """The name of the cache entry that holds what a load returns.

    Args:
        request: the call, resolved, without `hf_model`. All of its options but how the load goes
            are part of the name; an adapter is known by its files, or its commit on the hub.
    """
    options, arguments, keywords = request.options, request.arguments, request.keywords
    located = request.located
    assert located is not None
    assert located.location is not None
    device = device_asked_for(arguments) if arguments["move_to_device"] else torch.device("cpu")
    known = {
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "numbers": _NUMBERS,
        "class": f"{request.cls.__module__}.{request.cls.__qualname__}",
        # Not for the first road: keys are those of versions that had no other.
        **({} if request.road.name == "HookedTransformer" else {"road": request.road.name}),
        "source": _source(located.location),
        "files": keywords.files,
        "overrides": keywords.overrides,
        "trust_remote_code": keywords.trust_remote_code,
        "dtype": request.dtype,
        # Another device rounds otherwise.
        "device": device.type if options.device_map is None else str(options.device_map),
        "own_tokenizer": arguments["tokenizer"] is None,
        **{name: arguments[name] for name in _IN_THE_COPY},
        **{
            item.name: getattr(options, item.name)
            for item in fields(options)
            if item.name not in (*_NOT_IN_THE_NUMBERS, "layout")
        },
        # Not where it is the default: likewise.
        **({} if options.layout == FORWARD else {"layout": options.layout}),
        "adapter": [
            (_source(place), weight)
            for place, (_, weight) in zip(located.adapters, options.adapter, strict=True)
        ],
    }
    text = json.dumps(_identity(known), sort_keys=True)
    label = "".join(
        c if c.isalnum() else "-" for c in (located.location.repo or located.location.folder.name)
    )
    return f"{label[-40:].strip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _source(location: Location) -> list[Any]:
    file = [] if location.gguf_file is None else [location.gguf_file]
    if location.commit is not None:
        return [location.repo, location.commit, location.subfolder, *file]
    return [*_files_of(location.folder), *file]


def _files_of(folder: Path) -> list[Any]:
    """Path, size and times of every file at the top of a folder, of the shards of an index, and of
    the weights of TransformerLens' own toy models, which may lie deeper.
    """
    files = {path for path in folder.iterdir() if path.is_file()}
    files.update(folder.rglob("*.pth"))
    for index in [path for path in files if path.name.endswith(".index.json")]:
        check_link(folder, index.name)
        files.update(folder / shard for shard in read_index(index).values())
    found: list[Any] = [f"folder {folder.resolve()}"]
    for path in sorted(files):
        if path.exists():
            status = path.stat()
            times = (status.st_mtime_ns, status.st_ctime_ns)  # the second cannot be set
            found.append((str(path.resolve()), status.st_size, *times))
    return found


def _identity(value: Any) -> Any:
    """A value as JSON; of folders, such as an adapter's, what is in them."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (str, Path)):
        folder = Path(value)
        is_folder = len(str(value)) < 4096 and "\0" not in str(value) and folder.is_dir()
        return _files_of(folder) if is_folder and str(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): _identity(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity(inner) for inner in value]
    if is_dataclass(value):
        return {item.name: _identity(getattr(value, item.name)) for item in fields(value)}
    return repr(value)
