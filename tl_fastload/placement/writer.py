"""Writes weights into the memory of a live model, one after the other and none twice.

A source may be memory of the model itself: layers that change places, a transposed view. Whatever
will still be read is read before it is overwritten; only where targets read each other in a circle
is one value set aside, the only extra memory that is ever held.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from tl_fastload.ground.geometry import span
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.recipes.nodes import MemorySource, Source
from tl_fastload.source.reader import FileSource


@dataclass(frozen=True)
class Write:
    """One tensor of the model and where its new values are.

    Attributes:
        name: of the tensor.
        target: parameter or buffer; its device, dtype and strides stay.
        source: the values, of the same shape.
    """

    name: str
    target: torch.Tensor
    source: Source


@dataclass
class InPlaceWriter:
    """Does writes in an order that is safe.

    Args:
        writes: what is to be written.
        wrote: told of every write that is done.
        writing: told of every write before it begins.
    """

    writes: list[Write]
    wrote: Callable[[Write], None] = lambda write: None
    writing: Callable[[Write], None] = lambda write: None
    _pending: dict[str, Write] = field(default_factory=dict)
    _readers: Mapping[str, list[str]] = field(default_factory=dict)
    _aside: dict[str, torch.Tensor] = field(default_factory=dict)

    def run(self) -> None:
        """Write everything, the largest first: what does not fit fails before anything changed."""
        todo = [write for write in self.writes if not _is_done(write)]
        todo.sort(key=lambda write: -write.target.numel())
        self._pending = {write.name: write for write in todo}
        self._readers = _readers(todo)
        for write in todo:
            if write.name in self._pending:
                self._write(write)

    def _write(self, write: Write) -> None:
        """Write one tensor, after those that read the memory it lies in."""
        del self._pending[write.name]
        for name in self._readers.get(write.name, ()):
            reader = self._pending.get(name)
            if reader is not None:
                self._waiting.append(write)
                self._write(reader)
                self._waiting.pop()
        for waiting in self._waiting:
            if waiting.name not in self._aside and _overlap(waiting.source, write.target):
                self._aside[waiting.name] = _copy(waiting.source)
        own = self._aside.pop(write.name, None)
        if own is None and _overlap(write.source, write.target):
            own = _copy(write.source)
        self.writing(write)
        _fill(write.target, write.source if own is None else MemorySource(own, write.name))
        self.wrote(write)

    def __post_init__(self) -> None:
        self._waiting: list[Write] = []


def _fill(target: torch.Tensor, source: Source) -> None:
    # Tensors that were made in inference mode can be written to in that mode only.
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        if isinstance(source, MemorySource):
            target.copy_(source.tensor.reshape(target.shape))
            return
        out = target.detach().reshape(source.shape)
        geometry = torch.empty_strided(
            source.shape, source.stride, dtype=source.dtype, device="meta"
        )
        casts = () if source.dtype == target.dtype else (target.dtype,)
        source.read_into(out, geometry, casts)
        out.as_strided((0,), (1,)).zero_()  # tells autograd and others that the tensor has changed


def _copy(source: Source) -> torch.Tensor:
    if not isinstance(source, MemorySource):
        raise TypeError(f"{source.name} is not in memory")
    return source.tensor.clone()


def _is_done(write: Write) -> bool:
    """Whether the source is the target itself."""
    if not isinstance(write.source, MemorySource):
        return False
    tensor, target = write.source.tensor, write.target
    if isinstance(tensor, QuantizedTensor) or isinstance(target, QuantizedTensor):
        return getattr(tensor, "content", None) is getattr(target, "content", 0)
    return (
        tensor.data_ptr() == target.data_ptr()
        and tensor.device == target.device
        and (tensor.shape, tensor.stride()) == (target.shape, target.stride())
        and tensor.dtype == target.dtype
    )


def _readers(writes: list[Write]) -> dict[str, list[str]]:
    """For each target, the other writes whose source lies in its memory."""
    spans = sorted(
        ((*own, write.name) for write in writes if (own := _span(write.target)) is not None),
        key=lambda one: (str(one[0]), one[1], one[2]),
    )
    starts = [(str(device), start) for device, start, _, _ in spans]
    # The farthest byte that targets up to here reach: some may lie in others.
    reach: list[int] = []
    for number, (device, _, stop, _) in enumerate(spans):
        same = number > 0 and spans[number - 1][0] == device
        reach.append(max(stop, reach[-1]) if same else stop)
    found: dict[str, list[str]] = {}
    for write in writes:
        read = _source_span(write.source)
        if read is None:
            continue
        device, start, stop = read
        number = bisect_left(starts, (str(device), stop)) - 1
        while number >= 0 and spans[number][0] == device and reach[number] > start:
            if spans[number][2] > start and spans[number][3] != write.name:
                found.setdefault(spans[number][3], []).append(write.name)
            number -= 1
    return found


def _overlap(source: Source, target: torch.Tensor) -> bool:
    one, other = _source_span(source), _span(target)
    if one is None or other is None or one[0] != other[0]:
        return False
    return one[1] < other[2] and other[1] < one[2]


def _source_span(source: Source) -> tuple[torch.device, int, int] | None:
    return None if isinstance(source, FileSource) else _span(getattr(source, "tensor", None))


def _span(tensor: torch.Tensor | None) -> tuple[torch.device, int, int] | None:
    """Device, first byte and the byte after the last; None where nothing can be overwritten."""
    if tensor is None or isinstance(tensor, QuantizedTensor) or tensor.numel() == 0:
        return None
    start = tensor.data_ptr()
    return tensor.device, start, start + span(tensor) * tensor.element_size()
