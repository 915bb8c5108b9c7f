"""What `load_weights_` can read from: a state dict, a file, a folder or an index, as one table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tl_fastload.copies.contents import open_copy
from tl_fastload.copies.manifest import MANIFEST, checked_geometry, is_copy
from tl_fastload.errors import ArgumentError
from tl_fastload.ground.mark import require_whole
from tl_fastload.ground.paths import exists, expanded
from tl_fastload.ground.wrappers import unwrapped
from tl_fastload.recipes.nodes import MemorySource, Source
from tl_fastload.request.options import is_on_network
from tl_fastload.roads.known import find_road
from tl_fastload.source.checkpoint import open_weights
from tl_fastload.source.choose import choose
from tl_fastload.source.gguf import SUFFIX as GGUF
from tl_fastload.source.location import Location, file_names
from tl_fastload.source.reader import CHUNK_BYTES, FileMaps, FileReader, FileSource
from tl_fastload.source.torch_files import unnested


@dataclass
class WeightSource:
    """Weights that are known and not read yet.

    Attributes:
        label: for messages and the report.
        table: key -> where its values are.
        unusable: key -> why it can be nobody's weight.
        folder: where the files lie; None for a state dict.
        config: Hugging Face's configuration, of a model in memory.
        notes: for the report.
        flags: of a processed copy, the steps that were asked for.
        road: TransformerLens' class, of a model of its or of a processed copy.
        built: what `Road.stored` says of that model.
    """

    label: str
    table: dict[str, Source]
    unusable: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    config: Any = None
    notes: list[str] = field(default_factory=list)
    flags: dict[str, bool] | None = None
    road: str | None = None
    built: Mapping[str, Any] | None = None


def open_source(source: Any, reader: FileReader) -> WeightSource:
    """Make a table of a source's tensors, reading headers only.

    Args:
        source: a mapping of tensors, a module, or the path of a file, a folder (also of a processed
            copy) or an index.
        reader: reads the files later.

    Raises:
        CheckpointError: files are missing, truncated, corrupt, or would run code.
        ArgumentError: it is no source of weights, or there is no such file.
    """
    if isinstance(source, nn.Module):
        return _of_model(unwrapped(source))
    if isinstance(source, Mapping):
        return _of_mapping(source, "a state dict")
    if isinstance(source, (str, os.PathLike)):
        return _of_path(expanded(source), reader)
    raise ArgumentError(
        f"Weights cannot come from a {type(source).__name__}. Pass a state dict, a model, or the "
        "path of a safetensors file, a torch file, an index or a folder."
    )


def read_through(table: Mapping[str, Source], reader: FileReader) -> None:
    """Read every byte of a table's files once and keep none, so that what cannot be read is known
    before anything is written; what follows comes from the system's cache.

    Raises:
        CheckpointError: a file cannot be read, or is shorter than it was.
    """
    entries = [source.entry for source in table.values() if isinstance(source, FileSource)]
    for entry in sorted(entries, key=lambda entry: (str(entry.path), entry.offset)):
        for start in range(entry.offset, entry.offset + entry.nbytes, CHUNK_BYTES):
            reader.scratch(entry.path, start, min(start + CHUNK_BYTES, entry.offset + entry.nbytes))
    reader.files.check_all()


def _of_model(model: nn.Module) -> WeightSource:
    road = find_road(model)
    if road is not None:
        require_whole(model, "load_weights_")
    held = model if road is None else road.stored(model)
    found = _of_mapping(held.state_dict(), f"a {type(model).__name__}")
    if road is not None:
        found.road, found.built = road.name, getattr(held, "built", None)
        return found
    config = getattr(model, "config", None)
    found.config = config if hasattr(config, "to_dict") else None
    return found


def _of_mapping(source: Mapping[Any, Any], label: str) -> WeightSource:
    state, key = unnested(source)
    found = WeightSource(label, {})
    if key is not None:
        found.notes.append(f"The weights were found under the key {key!r}.")
    for name, value in state.items():
        reason = _why_unusable(value)
        if not isinstance(name, str) or reason is not None:
            found.unusable[str(name)] = reason or "its key is no text"
        else:
            found.table[name] = MemorySource(value, name)
    return found


def _why_unusable(value: Any) -> str | None:
    if not isinstance(value, torch.Tensor):
        return f"it is a {type(value).__name__}, not a tensor"
    if type(value).__name__ == "DTensor":
        return "it is one process's part of a tensor: gather the full state dict first"
    if value.layout is not torch.strided or value.is_quantized:
        return "it is sparse or quantized by torch: make it an ordinary dense tensor"
    return "it is on the meta device and has no values" if value.is_meta else None


def _of_path(path: Path, reader: FileReader) -> WeightSource:
    if not exists(path):
        raise ArgumentError(
            f"There is no file or folder {path.absolute()}. Check the path; weights on the hub are "
            "downloaded with huggingface_hub.snapshot_download first."
        )
    folder = path if path.is_dir() else path.parent
    if is_copy(folder):
        if path.is_file() and path.name != MANIFEST:
            raise ArgumentError(
                f"{path} is a part of a processed copy, which means nothing without the rest. Pass "
                f"its folder, {folder}."
            )
        return _of_copy(folder, reader)
    location = Location(folder, str(folder))
    names = [path.name] if path.is_file() else file_names(location).files
    gguf = [name for name in names if name.endswith(GGUF)]
    if gguf and choose(names) is None:
        raise ArgumentError(
            f"{folder / gguf[0]} is a GGUF file, whose weights go into new models only: pass it to "
            "from_pretrained_lean, with dequantize=True for ordinary weights, and that model here."
        )
    checkpoint = open_weights(location, weights_file=None if path.is_dir() else path.name)
    table, notes = checkpoint.sources(reader)
    notes = [*checkpoint.notes, *notes] if path.is_dir() else notes
    return WeightSource(str(path), table, folder=folder, notes=notes)


def _of_copy(folder: Path, reader: FileReader) -> WeightSource:
    """A processed copy: plain tensors are read as they are written, quantized ones are mapped."""
    contents = open_copy(folder)
    manifest = contents.manifest
    reader.maps = None if is_on_network(folder) else FileMaps(reader.files)
    table: dict[str, Source] = {}
    for name, view in {**manifest.buffers, **manifest.parameters}.items():
        if view.quantized is None:
            entry = contents.entries[view.tensors[""]]
            table[name] = FileSource(entry, reader, checked_geometry(view, entry))
        else:
            table[name] = MemorySource(contents.tensor(view, reader, torch.device("cpu")), name)
    return WeightSource(
        *(str(folder), table),
        folder=folder,
        flags=manifest.flags,
        road=manifest.road,
        built=manifest.built,
    )
