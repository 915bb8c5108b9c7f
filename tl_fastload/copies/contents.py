"""A processed copy without its weights: what is known of them by its JSON and its headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from tl_fastload import quantized
from tl_fastload.copies.manifest import (
    Manifest,
    View,
    checked_geometry,
    read_manifest,
    stored_tensors,
)
from tl_fastload.errors import CheckpointError
from tl_fastload.ground.geometry import copied, same_layout
from tl_fastload.request.options import DEFAULT_LAYOUT, Options
from tl_fastload.roads.known import road_of
from tl_fastload.source.reader import FileReader, FileSource
from tl_fastload.source.safetensors import TensorEntry

# Of a copy that other processes save again and again.
_TRIES = 5
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Contents:
    """A copy without its weights.

    Attributes:
        manifest: its JSON.
        entries: the stored tensors; those of files that are not here must not be read.
        missing_bytes: what is not here yet.
    """

    manifest: Manifest
    entries: dict[str, TensorEntry]
    missing_bytes: int = 0

    def bytes_of(self, view: View) -> int:
        """Bytes that a parameter or a buffer is stored in."""
        return sum(self.entries[key].nbytes for key in view.tensors.values())

    def quantized_bytes(self) -> dict[str, int]:
        """Bytes of the quantized parameters."""
        views = self.manifest.parameters.items()
        return {name: self.bytes_of(view) for name, view in views if view.quantized is not None}

    def parameters(self) -> Iterator[tuple[str, View]]:
        """The parameters; one that has several names under the first of them."""
        seen = set()
        for name, view in self.manifest.parameters.items():
            keys = tuple(view.tensors.values())
            if keys not in seen:
                seen.add(keys)
                yield name, view

    def tensor(
        self,
        view: View,
        reader: FileReader,
        device: torch.device,
        strides: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """A parameter or a buffer: mapped where `reader.maps` is, else read.

        Args:
            view: of the copy.
            reader: of its files.
            device: where it goes.
            strides: others than were saved, of a tensor that is not quantized; it is read then.
        """
        maps = reader.maps if device.type == "cpu" and strides is None else None
        parts = {}
        for part, key in view.tensors.items():
            entry = self.entries[key]
            geometry = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            if view.quantized is None:
                geometry = checked_geometry(view, entry)
            if maps is not None and entry.nbytes:
                parts[part] = maps.view(entry, geometry)
                continue
            out = torch.empty_like(geometry, device=device)
            FileSource(entry, reader).read_into(out, geometry, ())
            parts[part] = out if strides is None else copied(out, strides, out.dtype)
        if view.quantized is None:
            return parts[""]
        dtype = view.dtype or torch.float32
        return quantized.rebuild(
            parts, view.quantized, view.shape, view.strides, view.offset, dtype, is_parameter=False
        )


def opened(folder: Path, use: Callable[[Manifest], _Made], *, again: bool = True) -> _Made:
    """What `use` makes of a copy's JSON; from the beginning if another process saved the copy
    meanwhile.

    Args:
        folder: of the copy.
        use: what is done.
        again: False if it cannot begin again.

    Raises:
        CheckpointError: the copy is damaged, or this version cannot read it.
    """
    manifest = read_manifest(folder)
    for _ in range(_TRIES if again else 1):
        try:
            return use(manifest)
        except (CheckpointError, OSError) as error:
            failed = error
        before, manifest = manifest, read_manifest(folder)
        if manifest.copy_id == before.copy_id:
            break
    if isinstance(failed, CheckpointError):
        raise failed
    raise CheckpointError(
        f"{folder}: the copy could not be read to its end ({failed}). If it was removed or saved "
        "again meanwhile, load it again."
    ) from failed


def open_copy(folder: Path) -> Contents:
    """The JSON and the headers of a copy.

    Raises:
        CheckpointError: as `opened`.
    """
    return opened(folder, lambda manifest: Contents(manifest, stored_tensors(folder, manifest)))


def layout_of(manifest: Manifest, options: Options) -> str:
    """The memory order that a load of a copy gives: what is asked for, else as saved."""
    return manifest.layout if options.layout is DEFAULT_LAYOUT else options.layout


@dataclass(frozen=True)
class Places:
    """Where a load puts the tensors of a copy.

    Attributes:
        contents: the copy.
        device_of: the device of each parameter and buffer by its name.
        moves: the strides of parameters that are to have others than were saved: they are read.
        may_map: whether files are mapped.
    """

    contents: Contents
    device_of: Callable[[str], torch.device]
    moves: Mapping[str, tuple[int, ...]]
    may_map: bool

    @classmethod
    def of(
        cls,
        contents: Contents,
        model: nn.Module,
        options: Options,
        device_of: Callable[[str], torch.device],
        *,
        may_map: bool,
    ) -> Places:
        """Those of a load with these options, into a model of the same parameters."""
        manifest, moves = contents.manifest, {}
        order, road = layout_of(manifest, options), road_of(model)
        for name, view in manifest.parameters.items():
            if order != manifest.layout and view.quantized is None:
                module = model.get_submodule(name.rpartition(".")[0])
                strides = road.strides_in(order, module, name, torch.Size(view.shape))
                if not same_layout(view.shape, view.strides, strides):
                    moves[name] = strides
        return cls(contents, device_of, moves, may_map)

    def is_mapped(self, name: str) -> bool:
        """Whether a parameter or a buffer stays in its file."""
        return self.may_map and self.device_of(name).type == "cpu" and name not in self.moves

    def mapped_bytes(self) -> int:
        """Of the parameters."""
        found = self.contents
        return sum(
            found.bytes_of(view) for name, view in found.parameters() if self.is_mapped(name)
        )

    def held_bytes(self) -> dict[torch.device, int]:
        """The most that is allocated on each device: for everything that is read, and once more for
        the largest parameter that is put into another memory order.
        """
        held: Counter[torch.device] = Counter()
        twice: Counter[torch.device] = Counter()
        for name, view in (*self.contents.parameters(), *self.contents.manifest.buffers.items()):
            size, device = self.contents.bytes_of(view), self.device_of(name)
            if not self.is_mapped(name):
                held[device] += size
            if name in self.moves:
                twice[device] = max(twice[device], size)
        return dict(held + twice)
