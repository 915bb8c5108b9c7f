"""Counting what tensor operations allocate."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """While active, follows every tensor that an operation makes in memory of its own.

    Attributes:
        peak_bytes: the most that was alive at one time.
        total_bytes: all that was ever made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.total_bytes = 0
        self._alive_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = (torch.Tensor, torch.nn.Parameter)  # others have no storage to ask for
        known = {t.untyped_storage().data_ptr() for t in args if type(t) in plain}
        made = func(*args, **(kwargs or {}))
        if type(made) is torch.Tensor and made.device.type != "meta":
            storage = made.untyped_storage()
            if (
                storage.nbytes()
                and storage.data_ptr() not in known
                and func._schema.name != "aten::view"
            ):
                self._follow(made, storage.nbytes())
        return made

    def _follow(self, tensor: torch.Tensor, size_bytes: int) -> None:
        self._alive_bytes += size_bytes
        self.total_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes)
        weakref.finalize(tensor, self._forget, size_bytes)

    def _forget(self, size_bytes: int) -> None:
        self._alive_bytes -= size_bytes
