"""Bytes that torch allocates, counted operation by operation while they are alive."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tl_fastload.placement.ahead import ReadingAhead


class AllocatedBytes(TorchDispatchMode):
    """Counts the memory of every tensor that an operation of this thread makes; `peak` is the
    highest sum. Meanwhile nothing is read ahead, which another thread would do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._begin = ReadingAhead.begin

    def __enter__(self) -> AllocatedBytes:
        ReadingAhead.begin = lambda *args: None  # type: ignore[method-assign]
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        ReadingAhead.begin = self._begin  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if "set_" in str(func):  # lays a tensor over a mapped file
            return made
        given = {x.untyped_storage()._cdata for x in args if _is_plain(x)}
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if _is_plain(tensor):
                self._count(tensor.untyped_storage(), given)
        return made

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in given or (key in self._alive and not self._alive[key][0].expired()):
            return
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self._alive[key] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))


def _is_plain(x: Any) -> bool:
    return type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta
