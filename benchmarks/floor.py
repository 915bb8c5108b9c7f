"""The least that a load can do: allocate the final tensors, read and cast each from the file."""

from __future__ import annotations

import json
import struct
from io import FileIO
from pathlib import Path

import torch

_BUFFER_BYTES = 16 << 20
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load_floor(path: Path, dtype: torch.dtype, twice: str | None = None) -> list[torch.Tensor]:
    """Read every tensor of a safetensors file into its final memory.

    Args:
        path: the checkpoint file.
        dtype: of the final tensors. A tensor of this dtype is read straight into its memory,
            another one through a small buffer.
        twice: an entry to read a second time, into a tensor of its own: a tied embedding, which
            processing turns into two different parameters.

    Returns:
        The final tensors.
    """
    buffer = torch.empty(_BUFFER_BYTES, dtype=torch.uint8)
    tensors = []
    with path.open("rb", buffering=0) as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            for _ in range(2 if key == twice else 1):
                file.seek(8 + header_bytes + entry["data_offsets"][0])
                tensors.append(_read(file, entry["shape"], _DTYPES[entry["dtype"]], dtype, buffer))
    return tensors


def _read(
    file: FileIO,
    shape: list[int],
    stored: torch.dtype,
    dtype: torch.dtype,
    buffer: torch.Tensor,
) -> torch.Tensor:
    final = torch.empty(shape, dtype=dtype)
    flat = final.view(-1)
    if stored == dtype:
        _fill(file, flat.view(torch.uint8))
        return final
    item_bytes = torch.empty(0, dtype=stored).element_size()
    step = buffer.numel() // item_bytes
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        source = buffer[: part.numel() * item_bytes]
        _fill(file, source)
        part.copy_(source.view(stored))
    return final


def _fill(file: FileIO, target: torch.Tensor) -> None:
    rest = target.numpy().data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise EOFError("the checkpoint file is shorter than its header says")
        rest = rest[count:]
