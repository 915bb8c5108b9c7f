"""A range of a file that several views lie in, read once and held until all of them have been
taken out of it.
"""

from __future__ import annotations

import torch

from tl_fastload.ground.geometry import span
from tl_fastload.recipes.nodes import MemorySource, Source
from tl_fastload.source.reader import FileSource


class HeldSource(Source):
    """A stored tensor of which the part that some views touch is read at once.

    Args:
        source: the stored tensor.
        views: all that will be read of it, each once; a view that is read again is read anew.
    """

    def __init__(self, source: FileSource, views: list[torch.Tensor]) -> None:
        like = torch.empty_strided(source.shape, source.stride, dtype=source.dtype, device="meta")
        super().__init__(source.name, like)
        self.source = source
        self._first = min(int(view.storage_offset()) for view in views)
        self._stop = max(int(view.storage_offset()) + span(view) for view in views)
        self._left = len(views)
        self._held: torch.Tensor | None = None

    def lend(self, geometry: torch.Tensor) -> torch.Tensor | None:
        return None  # packed, as what is read is: products and sums follow strides

    def read_into(
        self, out: torch.Tensor, geometry: torch.Tensor, casts: tuple[torch.dtype, ...]
    ) -> None:
        if self._left == 0:
            self.source.read_into(out, geometry, casts)
            return
        if self._held is None:
            held = torch.empty(self._stop - self._first, dtype=self.dtype, device="cpu")
            run = torch.empty(self._stop, dtype=self.dtype, device="meta")[self._first :]
            self.source.read_into(held, run, ())
            self._held = held
        at = int(geometry.storage_offset()) - self._first
        view = self._held.as_strided(geometry.shape, geometry.stride(), at)
        whole = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device="meta")
        MemorySource(view).read_into(out, whole, casts)
        self._left -= 1
        if self._left == 0:
            self._held = None
