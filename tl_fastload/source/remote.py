"""The table of a model's tensors without its weights: what a hub has, by its headers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import Any

from tl_fastload.errors import CheckpointError
from tl_fastload.source import hub
from tl_fastload.source.checkpoint import Checkpoint, choose_weights, open_weights, read_headers
from tl_fastload.source.choose import read_index
from tl_fastload.source.location import Location, fetch, inside_repo, names_at_hand
from tl_fastload.source.safetensors import DTYPES, TensorEntry
from tl_fastload.source.torch_files import whole_bytes


def open_headers(
    location: Location, *, needs_values: tuple[str, ...] = (), **files: Any
) -> Checkpoint:
    """`tl_fastload.source.checkpoint.open_weights` without downloading weights.

    Of safetensors files that are not cached, the header is fetched and nothing else; of torch
    files, which have no such header, the size.

    Args:
        location: as for `open_weights`.
        needs_values: ends of names of tensors whose values say what the others are.
        **files: which weights, as for `open_weights`.

    Returns:
        The checkpoint. What is not cached is counted in `missing_bytes`, and its entries must not
        be read. `is_outline` says that names and shapes are unknown.

    Raises:
        As `open_weights`.
    """
    if location.gguf_file is not None:
        return open_weights(location, **files)
    choice = choose_weights(location, **files)
    names = [choice.name]
    if choice.is_index:
        names = sorted(set(read_index(fetch(location, choice.name)).values()))
    at_hand = names if location.repo is None else set(names_at_hand(location))
    missing = [name for name in names if name not in at_hand]
    if not missing:
        found = open_weights(location, **files)
        # Files that torch cannot map would have to be read whole to be looked into.
        opaque = not found.entries and whole_bytes(found.files, mmap=True) > 0
        return dataclasses.replace(found, is_outline=opaque)
    sizes = _sizes(location, missing)
    local = tuple(fetch(location, name) for name in names if name in at_hand)
    entries: dict[str, TensorEntry] = {}
    if choice.is_safetensors:
        entries = read_headers(local) if local else {}
        for name in missing:
            entries.update(remote_entries(location, name))
    _check_descriptions(location, entries, needs_values)
    missing_bytes = sum(sizes.values())
    return Checkpoint(
        folder=location.folder,
        label=location.label,
        files=(*local, *(location.folder / name for name in missing)),
        entries=MappingProxyType(entries),
        commit=location.commit,
        notes=location.notes,
        weight_bytes=missing_bytes + sum(path.stat().st_size for path in local),
        missing_bytes=missing_bytes,
        is_outline=not entries,
    )


def _check_descriptions(
    location: Location, names: Iterable[str], needs_values: tuple[str, ...]
) -> None:
    if any(name.endswith(needs_values) for name in names):
        raise CheckpointError(
            f"{location.label} holds quantized weights, and how these are packed is written in "
            "tensors, not in headers. Download it first, or plan the unquantized model with "
            "quantize=."
        )


def _sizes(location: Location, names: Sequence[str]) -> dict[str, int]:
    sizes = hub.file_sizes(location.repo or "", location.options)
    return {name: sizes.get(inside_repo(location, name), 0) for name in names}


def remote_entries(location: Location, name: str) -> dict[str, TensorEntry]:
    """The entries of a safetensors file on the hub; their offsets count from the end of the
    header.
    """
    found = hub.safetensors_header(
        location.repo or "", inside_repo(location, name), location.options
    )
    entries = {}
    for tensor, fields in found.tensors.items():
        begin, end = fields.data_offsets
        dtype = DTYPES[fields.dtype]
        shape = tuple(fields.shape)
        entries[tensor] = TensorEntry(
            tensor, dtype, shape, location.folder / name, begin, end - begin
        )
    return entries
