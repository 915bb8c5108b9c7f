"""Bytes of checkpoint files as tensors: read in pieces, cast on the way, or mapped.

What will be transformed is read (mapped pages would count as resident memory); what will not be is
mapped, which costs no memory and no time. A mapping is private: writing to a mapped tensor never
reaches the file.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from tl_fastload.errors import CheckpointError
from tl_fastload.ground.compat import item_bytes
from tl_fastload.ground.cores import pause
from tl_fastload.ground.geometry import is_dense, span
from tl_fastload.recipes.nodes import Source, cast_but_last
from tl_fastload.source.file_states import OpenFiles, unreadable
from tl_fastload.source.pinned import Bus, Ring, bus_to
from tl_fastload.source.safetensors import TensorEntry

CHUNK_BYTES = 1 << 20
WINDOW_BYTES = 64 << 20  # on a device, of a file's bytes that are cast or put in order there
MOST_BYTES = 4 << 20  # of one call, after which a read may be stopped
HELD_SPAN_BYTES = 8 << 20
DENSE_PIECE_BYTES = 128 << 10


class _Scratch(threading.local):
    """A buffer, and which range of a file it holds: each thread has one of its own."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.held: tuple[Path, int, int] | None = None


class FileReader:
    """Reads ranges of files; keeps each file open and a scratch buffer for the whole load.

    Several threads may read.

    Attributes:
        maps: mappings for what need not be read; None where nothing may be mapped.
        bus_to: the bus to a device, or None.
        files: what is open, and whether it is what it was.
    """

    def __init__(self) -> None:
        self.maps: FileMaps | None = None
        self.files = OpenFiles()
        self._scratch = _Scratch()
        self._stopped = False
        self.bus_to: Callable[[torch.device], Bus | None] = bus_to
        self._rings: dict[torch.device, Ring | None] = {}
        self._window: tuple[tuple[Any, ...], torch.Tensor] | None = None

    def close(self) -> None:
        """Close the files and free the buffers."""
        rings, self._rings, self._window = self._rings, {}, None
        self._scratch = _Scratch()
        with ExitStack() as all_of_them:  # also those behind one that fails
            all_of_them.callback(self.files.close)
            for ring in rings.values():
                if ring is not None:
                    all_of_them.callback(ring.close)

    def stop(self) -> None:
        """Have reads that other threads are in end soon, with an error: nobody wants them."""
        self._stopped = True

    def read(self, path: Path, offset: int, out: torch.Tensor) -> None:
        """Fill the one-dimensional uint8 tensor `out` with the bytes of `path` from `offset` on."""
        target = memoryview(out.numpy())  # type: ignore[arg-type]
        done = 0
        with self.files.reading(path) as descriptor:
            while done < len(target):
                pause()
                if self._stopped:
                    raise CheckpointError(f"Reading {path} was given up, as the load has failed.")
                try:
                    got = _read_at(descriptor, target[done : done + MOST_BYTES], offset + done)
                except OSError as error:
                    raise unreadable(path, error) from error
                if got == 0:
                    raise CheckpointError(
                        f"{path} ended {len(target) - done} bytes early: it was cut while it was "
                        "being read. Download or copy the file again."
                    )
                done += got

    def ring(self, device: torch.device) -> Ring | None:
        """What sends bytes to a device; None where they are read on the host and copied."""
        if device not in self._rings:
            bus = self.bus_to(device)
            try:
                self._rings[device] = None if bus is None else Ring(bus, self.read)
            except RuntimeError:  # no memory can be pinned
                self._rings[device] = None
        return self._rings[device]

    def window(
        self, ring: Ring, device: torch.device, path: Path, start: int, stop: int
    ) -> torch.Tensor:
        """The bytes `start:stop` of a file on a device; the last range is not sent again."""
        key = device, path, start, stop
        if self._window is None or self._window[0] != key:
            self._window = None  # before there is another one
            sent = torch.empty(stop - start, dtype=torch.uint8, device=device)
            ring.send(path, start, sent)
            self._window = key, sent
        return self._window[1]

    def scratch(self, path: Path, start: int, stop: int) -> torch.Tensor:
        """The bytes `start:stop` of a file in this thread's scratch buffer; the last range read is
        not read again.
        """
        size, scratch = stop - start, self._scratch
        if scratch.buffer.numel() < size:
            scratch.buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
            scratch.held = None
        view = scratch.buffer[:size]
        if scratch.held != (path, start, stop):
            scratch.held = None
            self.read(path, start, view)
            scratch.held = (path, start, stop)
        return view


def _read_at(descriptor: int, target: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows has no positioned read
    data = os.read(descriptor, len(target))
    target[: len(data)] = data
    return len(data)


class FileMaps:
    """Private mappings of whole files.

    Two parameters that select the same elements (tied weights) get two mappings, so that writing
    to one does not change the other; unwritten pages stay shared.

    Args:
        files: what the files were when they were looked at first.
    """

    def __init__(self, files: OpenFiles | None = None) -> None:
        self._files = OpenFiles() if files is None else files
        self._storages: dict[tuple[Path, int], torch.UntypedStorage] = {}
        self._taken: dict[Path, list[list[tuple[int, int]]]] = defaultdict(list)

    def view(self, entry: TensorEntry, geometry: torch.Tensor) -> torch.Tensor:
        """The selected elements of a file as a tensor that no other view of this object
        overlaps.
        """
        if entry.state is not None:
            self._files.expect({entry.path: entry.state})
        start, stop = byte_span(entry, geometry)
        layers = self._taken[entry.path]
        number = next((i for i, spans in enumerate(layers) if _take(spans, start, stop)), None)
        if number is None:
            number = len(layers)
            layers.append([(start, stop)])
        # A storage of just these bytes: saving such a tensor must not save the whole file.
        part: Any = self._storage(entry.path, number)[start:stop]
        flat = torch.empty(0, dtype=entry.dtype, device="cpu").set_(part)
        return flat.as_strided(geometry.shape, geometry.stride(), 0)

    def _storage(self, path: Path, number: int) -> torch.UntypedStorage:
        key = (path, number)
        if key not in self._storages:
            # The very file that was looked at, also if another one has taken its name meanwhile.
            descriptor = self._files.descriptor(path)
            name = f"/proc/self/fd/{descriptor}"
            name = name if Path(name).exists() else str(path)
            size_bytes = os.fstat(descriptor).st_size
            storage: Any = torch.UntypedStorage.from_file(name, False, size_bytes)
            self._storages[key] = storage
        return self._storages[key]


def _take(spans: list[tuple[int, int]], start: int, stop: int) -> bool:
    """Put a range among ranges that are in order, if it overlaps none of them."""
    at = bisect_right(spans, (start, stop))
    is_free = (at == 0 or spans[at - 1][1] <= start) and (at == len(spans) or stop <= spans[at][0])
    if is_free:
        spans.insert(at, (start, stop))
    return is_free


class FileSource(Source):
    """One tensor of a checkpoint file.

    Args:
        entry: where it lies.
        reader: reads it.
        geometry: a meta tensor, of all its elements in another order; None for row-major.
    """

    def __init__(
        self, entry: TensorEntry, reader: FileReader, geometry: torch.Tensor | None = None
    ) -> None:
        if geometry is None:
            geometry = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        if entry.state is not None:
            reader.files.expect({entry.path: entry.state})
        super().__init__(entry.name, geometry)
        self.entry = entry
        self.reader = reader

    reads_ahead = True

    def stop(self) -> None:
        self.reader.stop()

    def lend(self, geometry: torch.Tensor) -> torch.Tensor | None:
        return None

    def is_mapped(self) -> bool:
        """Whether the stored tensor itself is mapped, not read."""
        aligned = self.entry.offset % item_bytes(self.dtype) == 0
        return self.reader.maps is not None and aligned

    def whole(self) -> torch.Tensor:
        """The stored tensor itself: mapped if files may be mapped, else read."""
        geometry = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        if self.is_mapped() and self.reader.maps is not None:
            return self.reader.maps.view(self.entry, geometry)
        out = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self.read_into(out, geometry, ())
        return out

    def read_into(
        self, out: torch.Tensor, geometry: torch.Tensor, casts: tuple[torch.dtype, ...]
    ) -> None:
        if out.numel() == 0:
            return
        ring = self.reader.ring(out.device)
        if ring is not None:
            self._send(ring, out, geometry, casts)
        elif is_dense(geometry) and out.stride() == geometry.stride():
            self._read_dense(out, geometry, casts)
        else:
            self._read_strided(out, geometry, casts)

    def _send(
        self, ring: Ring, out: torch.Tensor, geometry: torch.Tensor, casts: tuple[torch.dtype, ...]
    ) -> None:
        """Only bytes of the file are sent; casts and orders of memory are made on the device."""
        start, stop = byte_span(self.entry, geometry)
        if not casts and is_dense(geometry) and out.stride() == geometry.stride():
            flat = out.as_strided((out.numel(),), (1,), out.storage_offset())
            ring.send(self.entry.path, start, flat.view(torch.uint8))
        elif stop - start > WINDOW_BYTES:
            for part, target in _halves(geometry, out):
                self._send(ring, target, part, casts)
        else:
            sent = self.reader.window(ring, out.device, self.entry.path, start, stop)
            view = sent.view(self.dtype).as_strided(geometry.shape, geometry.stride(), 0)
            out.copy_(cast_but_last(view, casts))

    def _read_dense(
        self, out: torch.Tensor, geometry: torch.Tensor, casts: tuple[torch.dtype, ...]
    ) -> None:
        start, stop = byte_span(self.entry, geometry)
        flat = out.as_strided((out.numel(),), (1,), out.storage_offset())
        if not casts and out.device.type == "cpu":
            self.reader.read(self.entry.path, start, flat.view(torch.uint8))
            return
        step = CHUNK_BYTES
        for first in range(start, stop, step):
            last = min(first + step, stop)
            piece = self.reader.scratch(self.entry.path, first, last).view(self.dtype)
            at = (first - start) // item_bytes(self.dtype)
            flat[at : at + piece.numel()].copy_(cast_but_last(piece, casts))

    def _read_strided(
        self, out: torch.Tensor, geometry: torch.Tensor, casts: tuple[torch.dtype, ...]
    ) -> None:
        start, stop = byte_span(self.entry, geometry)
        slowest = _slowest(geometry)
        if slowest is not None:
            piece = geometry.select(slowest, 0)
            if is_dense(piece) and piece.numel() * item_bytes(self.dtype) >= DENSE_PIECE_BYTES:
                # The heads of a fused matrix: each lies in one piece, nothing else need be read.
                for index in range(geometry.shape[slowest]):
                    target = out.select(slowest, index)
                    self.read_into(target, geometry.select(slowest, index), casts)
                return
            if stop - start > HELD_SPAN_BYTES:
                for part, target in _halves(geometry, out):
                    self.read_into(target, part, casts)
                return
        held = self.reader.scratch(self.entry.path, start, stop).view(self.dtype)
        view = held.as_strided(geometry.shape, geometry.stride(), 0)
        out.copy_(cast_but_last(view, casts))


def _slowest(geometry: torch.Tensor) -> int | None:
    long = [dim for dim in range(geometry.dim()) if geometry.shape[dim] > 1]
    return max(long, key=geometry.stride, default=None)


def _halves(
    geometry: torch.Tensor, out: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A view in two parts, along its slowest dimension, and where each is to go."""
    slowest = _slowest(geometry)
    assert slowest is not None  # one element lies in one piece
    half = geometry.shape[slowest] // 2
    sizes = [half, geometry.shape[slowest] - half]
    return zip(*(torch.split(one, sizes, slowest) for one in (geometry, out)), strict=True)


def byte_span(entry: TensorEntry, geometry: torch.Tensor) -> tuple[int, int]:
    """First byte, and the byte after the last, of the file range that a view touches."""
    size = item_bytes(entry.dtype)
    start = entry.offset + int(geometry.storage_offset()) * size
    return start, start + span(geometry) * size
