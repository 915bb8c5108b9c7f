"""What TransformerLens' own loader would need, counted while its code runs on promises.

The recording runs TransformerLens' converters and processing as they are, so a promise lives
exactly as long as the tensor that stock would hold in its place. Each operation that is no view
takes memory until the last promise of its result is gone; the highest sum is stock's peak. What
comes before and after that code follows three rules:

- transformers holds the whole model, cast to the dtype asked for. Version 5 leaves safetensors
  weights that need no cast in the mapped file (their pages count as resident once they are read,
  until the last of them is let go); everything else is memory of its own.
- That model goes when it has been converted, except for what the state dict still views.
- `load_state_dict` fills the new model's own memory, entry by entry, while the state dict empties.

And glibc gives a block back to the system when it is freed only from 32 MiB on; memory of smaller
ones is used again, and stays with the process.

So it follows every architecture, dtype, set of flags and version of TransformerLens: 3.x holds
an upcast copy of the state dict and clones of it, 2.x does not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tl_fastload.ground import compat
from tl_fastload.ground.own_defaults import looking_only
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.recipes.nodes import Node, SourceView
from tl_fastload.recipes.promise import Promise
from tl_fastload.source.reader import FileSource

# glibc's largest threshold (DEFAULT_MMAP_THRESHOLD_MAX), which it reaches as blocks are freed.
_RETURNED_FROM_BYTES = 32 << 20


class StockLedger:
    """Adds up memory that stock would hold, in bytes.

    Attributes:
        peak_anonymous_bytes: highest anonymous host memory.
        peak_host_bytes: highest resident host memory, file pages included.
        peak_device_bytes: highest memory on the other device.
        is_told: whether a road has told of anything.
    """

    def __init__(self) -> None:
        self.is_told = False
        self.peak_anonymous_bytes = 0
        self.peak_host_bytes = 0
        self.peak_device_bytes = 0
        self._filled = 0  # of the new model's own memory
        self._blocks = 0  # alive, of the large ones
        self._heap = 0  # alive, of the small ones
        self._highest_heap = 0
        self._device = 0
        self._seen_file = 0  # bytes of file pages that have been read
        self._mapped = 0  # allocations in a mapped file that are alive
        self._to_fill: dict[str, int] = {}  # the model's own memory, not touched yet

    @looking_only
    def hold(self, promises: Iterable[torch.Tensor], *, caller_holds: bool) -> None:
        """Count the weights of transformers' model.

        Args:
            promises: its weights.
            caller_holds: it is the caller's, so that it takes no further memory.
        """
        known: dict[int, Allocation] = {}
        read_through_a_mapping = 0
        for promise in promises:
            if not isinstance(promise, Promise):
                continue
            node = promise.node
            key = id(node.source) if isinstance(node, SourceView) else id(node)
            if key not in known:
                size = 0 if caller_holds else _bytes(promise)
                stays = not caller_holds and _stays_in_file(node)
                known[key] = Allocation(self, size, "file" if stays else "cpu")
                if not stays and not caller_holds:
                    read_through_a_mapping += _file_bytes(node)
            promise.memory = known[key]
        self._look()
        self.peak_host_bytes = max(self.peak_host_bytes, self._anonymous() + read_through_a_mapping)

    @looking_only
    def hand_over(self, root: Any, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Let go of transformers' model; the state dict holds on to what it views.

        Args:
            root: transformers' model, or None.
            state_dict: name -> promise or tensor.

        Returns:
            The state dict with promises of its own in place of the model's.
        """
        own: dict[str, Any] = {}
        kept: dict[Any, Allocation] = {}
        for name, value in state_dict.items():
            own[name] = value
            if isinstance(value, Promise):
                own[name] = Promise(value.node, value.meta, value.device)
                if isinstance(value.memory, Allocation):
                    if value.memory not in kept:
                        kept[value.memory] = value.memory.passed_on()
                    own[name].memory = kept[value.memory]
        held = root.named_parameters() if hasattr(root, "named_parameters") else ()
        for _, promise in (*held, *state_dict.items()):
            # Not only from this promise: torch keeps what a view was made of alive, too.
            if isinstance(promise, Promise) and isinstance(promise.memory, Allocation):
                promise.memory.release()
        return own

    @looking_only
    def prepare(self, model: nn.Module) -> None:
        """Count what building the model touches: torch fills the weights of its linear layers."""
        self.is_told = True
        self._to_fill = {name: bytes_of(parameter) for name, parameter in model.named_parameters()}
        for prefix, module in model.named_modules():
            if isinstance(module, nn.Linear):
                for name, parameter in module.named_parameters(recurse=False):
                    # TransformerLens makes these layers in float32, whatever dtype is asked for.
                    self._filled += parameter.numel() * 4
                    self._to_fill.pop(f"{prefix}.{name}")
        self._look()

    def load(self, state_dict: Mapping[str, Any]) -> None:
        """Count a `load_state_dict`, after which nobody needs the state dict."""
        for name, value in state_dict.items():
            _touch(value)
            self._filled += self._to_fill.pop(name, 0)
        self._look()
        for value in state_dict.values():
            if isinstance(value, Promise):
                value.memory = None

    def take(self, size: int, where: str) -> None:
        """Count an allocation, or a release if `size` is negative."""
        if where == "cpu" and abs(size) < _RETURNED_FROM_BYTES:
            self._heap += size
            self._highest_heap = max(self._highest_heap, self._heap)
        elif where == "cpu":
            self._blocks += size
        elif where == "file":
            self._mapped += 1 if size > 0 else -1
            if self._mapped == 0:
                self._seen_file = 0
        else:
            self._device += size

    def see(self, size: int) -> None:
        """Count file pages that have been read."""
        self._seen_file += size

    def _anonymous(self) -> int:
        return self._filled + self._blocks + self._highest_heap

    def _look(self) -> None:
        anonymous = self._anonymous()
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, anonymous)
        self.peak_host_bytes = max(self.peak_host_bytes, anonymous + self._seen_file)
        self.peak_device_bytes = max(self.peak_device_bytes, self._device)


class Allocation:
    """Memory behind one or more promises; released with the last of them.

    Args:
        ledger: adds up.
        size: bytes.
        where: "cpu", "file" (a mapped one), or another device.
    """

    __slots__ = ("_is_held", "_is_read", "_ledger", "_size", "_where")

    def __init__(self, ledger: StockLedger, size: int, where: str) -> None:
        self._ledger, self._size, self._where = ledger, size, where
        self._is_read = where != "file"
        self._is_held = True
        ledger.take(size, where)

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Count the memory as gone, once."""
        if self._is_held:
            self._is_held = False
            self._ledger.take(-self._size, self._where)

    def passed_on(self) -> Allocation:
        """The same memory, for other promises to hold; this one holds nothing any more."""
        made = copy.copy(self)
        self._is_held = False
        return made

    def read(self) -> None:
        """Count the pages of a mapped file, once."""
        if not self._is_read:
            self._is_read = True
            self._ledger.see(self._size)

    def follow(self, args: tuple[Any, ...], made: Any, is_view: bool) -> None:
        """As `tl_fastload.recipes.promise.Memory`."""
        results = [made] if isinstance(made, Promise) else made
        if is_view:
            for promise in results:
                promise.memory = self
            return
        _touch(args)
        for promise in results:
            promise.memory = Allocation(self._ledger, _bytes(promise), promise.device.type)
        self._ledger._look()


def _stays_in_file(node: Node) -> bool:
    return compat.TRANSFORMERS.major >= 5 and _file_bytes(node) > 0 and not _casts(node)


def _file_bytes(node: Node) -> int:
    """Bytes of the safetensors entry that a weight is, or is a cast of."""
    is_entry = isinstance(node, SourceView) and isinstance(node.source, FileSource)
    return node.source.entry.nbytes if is_entry else 0  # type: ignore[attr-defined]


def _casts(node: Node) -> bool:
    return not isinstance(node, SourceView) or bool(node.casts)


def _touch(value: Any) -> None:
    if isinstance(value, (tuple, list)):
        for inner in value:
            _touch(inner)
    elif isinstance(value, Promise) and isinstance(value.memory, Allocation):
        value.memory.read()


def _bytes(promise: Promise) -> int:
    return bytes_of(promise.meta)
