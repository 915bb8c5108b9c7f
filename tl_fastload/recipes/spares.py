"""Memory for the values of a load: a block that one no longer needs serves the next of its size.

Pages that the system has just handed out are the dearest part of a load: it clears each one when
it is touched first. So what evaluating has finished with is kept, as long as there is room for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import torch

from tl_fastload.ground.compat import item_bytes
from tl_fastload.ground.geometry import is_unbroken
from tl_fastload.report.memory import bring_in_pages

LEAST_BYTES = 256 << 10
"""Of a block; what is smaller comes from the heap, which has it at hand."""


class Spares:
    """Spares of host memory, each as large as one value, and its storage's own.

    Several threads may use it.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._room_bytes = 0
        self._kept: dict[int, list[torch.UntypedStorage]] = {}
        self._kept_bytes = 0

    def empty(
        self,
        shape: Sequence[int],
        strides: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """As `torch.empty_strided`: in a block that was kept, if one is as large."""
        size = torch.Size(shape).numel() * item_bytes(dtype)
        if device.type != "cpu" or size < LEAST_BYTES or not is_unbroken(shape, strides):
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)
        with self._lock:
            found = self._kept.get(size)
            block = found.pop() if found else None
            self._kept_bytes -= size if block is not None else 0
        if block is None:
            block = _new_block(size)
        return torch.empty(0, dtype=dtype, device="cpu").set_(block, 0, shape, strides)

    def keep(self, tensor: torch.Tensor) -> None:
        """Take the memory of a value that nobody will read again."""
        if type(tensor) is not torch.Tensor or tensor.device.type != "cpu":
            return
        self._keep(tensor.untyped_storage())

    def _keep(self, block: torch.UntypedStorage) -> None:
        size = block.nbytes()
        with self._lock:
            if LEAST_BYTES <= size <= self._room_bytes - self._kept_bytes:
                self._kept.setdefault(size, []).append(block)
                self._kept_bytes += size

    def stock(self, size_bytes: int) -> None:
        """Keep a new block, if there is room for it and there are not two as large already."""
        with self._lock:
            fits = LEAST_BYTES <= size_bytes <= self._room_bytes - self._kept_bytes
            has_some = len(self._kept.get(size_bytes, ())) >= 2
        if fits and not has_some:
            self._keep(_new_block(size_bytes))

    def limit(self, room_bytes: int) -> None:
        """Keep no more than so much from now on; what is too much goes, the largest first."""
        with self._lock:
            self._room_bytes = room_bytes
            for size in sorted(self._kept, reverse=True):
                while self._kept_bytes > room_bytes and self._kept[size]:
                    self._kept[size].pop()
                    self._kept_bytes -= size


def _new_block(size_bytes: int) -> torch.UntypedStorage:
    block = torch.empty(size_bytes, dtype=torch.uint8, device="cpu").untyped_storage()
    bring_in_pages(block.data_ptr(), size_bytes)
    return block
