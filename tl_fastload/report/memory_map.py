"""Where the memory of a loaded model lies, layer by layer: mapped, quantized or dense."""

from __future__ import annotations

import sys
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tl_fastload.ground.mark import require_whole
from tl_fastload.ground.role import Role, RoleOf
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.report.memory import each_once, stored_parts

STATES = ("dense", "quantized", "mapped", "quantized and mapped", "on a device")


@dataclass(frozen=True)
class Part:
    """Memory of one component of one layer, in one state.

    Attributes:
        layer: "embed", "0" to the last block's number, or "unembed".
        component: "attention", "MLP", "embedding", "norms" or "buffers".
        state: one of `STATES`: "mapped" lies in a file, "dense" in anonymous memory,
            "on a device" outside of the CPU's memory (quantized or not).
        size_bytes: each element counted once.
    """

    layer: str
    component: str
    state: str
    size_bytes: int


def memory_map(model: Any, role: RoleOf) -> list[Part]:
    """`tl_fastload.memory_map.memory_map`, for models of any names.

    Args:
        model: any model.
        role: what each of its parameters and buffers is.

    Raises:
        HalfWrittenError: a step in place was interrupted in it.
    """
    require_whole(model, "A picture of the model")
    spans = _mapped_spans()
    sizes: dict[tuple[str, str, str], int] = {}
    buffers = dict(model.named_buffers())
    found: list[tuple[str, bool, torch.Tensor]] = []
    for name, tensor in (*model.named_parameters(), *buffers.items()):
        is_quantized = getattr(tensor, "content", None) is not None
        found += [(name, is_quantized, piece) for piece in stored_parts(tensor)]
    for number in each_once([piece for *_, piece in found]):
        name, is_quantized, piece = found[number]
        state = _state(piece, is_quantized, _lies_in(piece.data_ptr(), spans))
        key = (*_place(role(name), name in buffers), state)
        sizes[key] = sizes.get(key, 0) + bytes_of(piece)
    parts = [Part(*key, size_bytes) for key, size_bytes in sizes.items()]
    return sorted(parts, key=lambda part: _rank(part.layer))


def _state(piece: torch.Tensor, is_quantized: bool, is_mapped: bool) -> str:
    if piece.device.type != "cpu":
        return "on a device"
    if is_quantized:
        return "quantized and mapped" if is_mapped else "quantized"
    return "mapped" if is_mapped else "dense"


def _place(role: Role, is_buffer: bool) -> tuple[str, str]:
    """Layer and component of a parameter."""
    layer = "unembed" if role.is_last else "embed" if role.layer is None else str(role.layer)
    component = "norms" if role.part == "other" else role.part
    return layer, "buffers" if is_buffer else component


def _rank(layer: str) -> tuple[int, int]:
    return ({"embed": 0, "unembed": 2}.get(layer, 1), int(layer) if layer.isdecimal() else 0)


def _mapped_spans() -> list[tuple[int, int]]:
    """Addresses at which mapped files begin and end, in order."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
    spans = []
    for line in lines:
        span, _, _, _, inode, *path = line.split(maxsplit=5)
        # torch shares tensors between processes through /dev/shm, which is memory.
        if inode != "0" and path and not path[0].startswith("/dev/"):
            start, end = span.split("-")
            spans.append((int(start, 16), int(end, 16)))
    return spans


def _lies_in(address: int, spans: list[tuple[int, int]]) -> bool:
    after = bisect_right(spans, (address, sys.maxsize))
    return after > 0 and address < spans[after - 1][1]
