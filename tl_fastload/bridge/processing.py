"""TransformerLens' weight processing on a live bridge: recorded, then placed in place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tl_fastload.bridge.leftovers import require_none_left
from tl_fastload.bridge.placing import BridgeShelf, is_small_and_odd, strides_in
from tl_fastload.bridge.quantizing import Inputs
from tl_fastload.bridge.slots import ATTRIBUTE, Slot, slots_of
from tl_fastload.errors import HalfWrittenError, LeanLoadError, NotEnoughMemory, is_out_of_memory
from tl_fastload.ground import compat
from tl_fastload.ground.mark import MARK, Mark
from tl_fastload.huggingface.empty import SkipRandomInit
from tl_fastload.placement.placer import Placer
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.quantized.quantizer import Quantizer
from tl_fastload.quantized.recipes import promise_of_tensor
from tl_fastload.recipes.evaluate import sources
from tl_fastload.recipes.live import LivePromise, Memory, live_tensors
from tl_fastload.recipes.nodes import MemorySource, SourceView
from tl_fastload.recipes.promise import Promise
from tl_fastload.report.progress import Progress

_Key = tuple[int, int, str]
_TENSOR = object()


def process_in_place(
    bridge: Any, stock: Callable[[], None], flags: Mapping[str, bool], progress: Progress
) -> None:
    """Run TransformerLens' `process_weights` on promises of a bridge's weights, then give each
    parameter its new value, one at a time; what does not change stays where it is.

    Args:
        bridge: the bridge, with values.
        stock: runs the processing.
        flags: the steps that it is asked for.
        progress: told of each parameter.

    Raises:
        HalfWrittenError: it stopped after some parameters had new values; NotEnoughMemory, if that
            is why. Where it stops before, the bridge is what it was.
    """
    before = _Before(bridge)
    mark = Mark("enable_compatibility_mode")
    try:
        _process(bridge, stock, flags, progress, before, mark)
    except BaseException as error:
        if not mark.written and not before.is_spent:
            before.undo()
            raise
        before.restore()
        if isinstance(error, Exception):
            raise _explained(error, mark) from error
        raise
    bridge.__dict__.pop(MARK)


def _process(
    bridge: Any,
    stock: Callable[[], None],
    flags: Mapping[str, bool],
    progress: Progress,
    before: _Before,
    mark: Mark,
) -> None:
    before.replace()
    inputs = Inputs(bridge)
    with torch.no_grad(), SkipRandomInit():  # type: ignore[no-untyped-call]
        stock()
    before.keep_unchanged(slots_of(bridge))
    bridge.__dict__.pop("_processed", None)
    bridge.__dict__[MARK] = mark

    shelf = BridgeShelf(bridge, is_raw=False)
    shifts = inputs.shifts(shelf.recipes, flags)
    before.give([*shelf.recipes.values(), *shifts.values()])

    def writing(name: str) -> None:
        before.forget(shelf.slots(name))
        mark.written.add(name)

    placer = Placer(
        shelf,
        shelf.devices.__getitem__,
        assign=True,
        maps=None,
        map_any_layout=False,
        progress=progress,
        strides_of=strides_in,
        quantizer=Quantizer(None, shelf.role, shifts),
        writing=writing,
    )
    try:
        placer.place(shelf.recipes)
    finally:
        shelf.clear()
    require_none_left(bridge)


def _explained(error: Exception, mark: Mark) -> LeanLoadError:
    kind = NotEnoughMemory if is_out_of_memory(error) else HalfWrittenError
    return kind(
        f"{mark.step} stopped in the middle ({type(error).__name__}: {error}). Some weights of the "
        "bridge are processed and the others are not. Boot the model anew."
    )


class _Given(MemorySource):
    """Memory that nobody needs after it is read: it becomes the reader's."""

    is_given = True

    def __init__(self, source: MemorySource, before: _Before) -> None:
        super().__init__(source.tensor, source.name)
        self._before = before

    def lend(self, geometry: torch.Tensor) -> torch.Tensor:
        self._before.is_spent = True
        given = self._view(geometry)
        given.as_strided((0,), (1,)).zero_()  # tells autograd and others that the tensor changes
        return given


class _Before:
    """What a bridge was: its tensors, each until its slot has a new value, and all that is none.

    Attributes:
        is_spent: whether a new value is made in the memory of one of the tensors.
    """

    def __init__(self, bridge: Any) -> None:
        slots = slots_of(bridge)
        self.is_spent = False
        self._others = [(e, _without_tensors(e)) for e in _dictionaries(bridge)]
        own = {s.tensor.untyped_storage()._cdata for s in slots if s.kind != ATTRIBUTE}
        self._slots = {
            _key(slot): slot
            for slot in slots
            if slot.kind != ATTRIBUTE or slot.tensor.untyped_storage()._cdata in own
        }
        self._tensors: dict[_Key, torch.Tensor] = {k: s.tensor for k, s in self._slots.items()}
        self._unchanged: dict[_Key, torch.Tensor] = {}
        self._standing: set[int] = set()  # those of them that stand for a promise
        # For each memory: its promises' home and source, and a tensor that lies in it.
        self._memories: list[tuple[Memory, MemorySource, torch.Tensor]] = []

    def replace(self) -> None:
        """Put promises in place of the tensors; one tensor in two slots is one promise."""
        once: dict[int, tuple[str, Slot]] = {}
        for slot in self._slots.values():
            once.setdefault(id(slot.tensor), (slot.name, slot))
        quantized = {k: s.tensor for k, (_, s) in once.items() if _is_quantized(s.tensor)}
        dense = {k: found for k, found in once.items() if k not in quantized}
        made = live_tensors({f"{name}#{key}": s.tensor for key, (name, s) in dense.items()})
        promises = {key: made[f"{name}#{key}"] for key, (name, _) in dense.items()}
        for key, tensor in quantized.items():
            bytes_ = promise_of_tensor(tensor, once[key][0])
            promises[key] = LivePromise(bytes_.node, bytes_.meta, bytes_.device)
        known: set[int] = set()
        for slot in self._slots.values():
            promise = promises[id(slot.tensor)]
            promise._is_param = isinstance(slot.tensor, nn.Parameter)
            # Who holds bytes and changes nothing shares them.
            if id(promise.home) not in known and not _is_quantized(slot.tensor):
                known.add(id(promise.home))
                node = promise.node
                assert isinstance(node, SourceView)
                assert isinstance(node.source, MemorySource)
                self._memories.append((promise.home, node.source, slot.tensor))
            slot.tensor = promise

    def restore(self) -> None:
        """Put the tensors back that have not been replaced by new values."""
        for key, tensor in self._tensors.items():
            self._slots[key].tensor = tensor

    def undo(self) -> None:
        """Make the bridge what it was, as long as nothing has been written."""
        for entries, others in self._others:
            for leaf in entries.keys() - others.keys():
                del entries[leaf]
            entries.update({k: value for k, value in others.items() if value is not _TENSOR})
        self._tensors.update(self._unchanged)
        self.restore()

    def forget(self, slots: list[Slot]) -> None:
        """Let go of tensors whose slots have new values."""
        for slot in slots:
            self._tensors.pop(_key(slot), None)

    def keep_unchanged(self, slots: list[Slot]) -> None:
        """Put memory back where processing has changed nothing, and let go of the rest."""
        for slot in slots:
            if isinstance(slot.tensor, LivePromise):
                slot.tensor.require_fresh()
        homes = {id(home): (home, tensor) for home, _, tensor in self._memories}
        made: dict[tuple[int, int], torch.Tensor] = {}
        for slot in slots:
            home, held = homes.get(id(getattr(slot.tensor, "home", None)), (None, None))
            if home is not None and held is not None and home.version == 0:
                slot.tensor = self._kept(slot, slot.tensor, held, made)
        free = {
            id(source): tensor
            for home, source, tensor in self._memories
            if not any(id(home) == key[0] for key in made)
        }
        kept: dict[int, torch.Tensor | None] = {}
        for slot in slots:
            # Processing in float32 leaves a copy of what it does not change in any other dtype.
            source = _source_of(slot.tensor)
            if source is None:
                continue
            copy = id(slot.tensor.home)  # which may stand in several slots
            held = kept.get(copy, free.pop(id(source), None))
            if held is not None and not is_small_and_odd(held.untyped_storage().data_ptr(), held):
                kept[copy] = held
                slot.tensor = self._kept(slot, slot.tensor, held, made)
        self._memories.clear()
        for slot in slots:
            if not isinstance(slot.tensor, LivePromise) and _key(slot) in self._tensors:
                self._unchanged[_key(slot)] = self._tensors.pop(_key(slot))

    def give(self, recipes: Iterable[Promise]) -> None:
        """Let a tensor that nobody else holds be the memory of the one recipe that reads it."""
        readers: dict[int, list[SourceView]] = {}
        for recipe in recipes:
            for view in sources(recipe.node):
                if isinstance(view.source, MemorySource):
                    memory = view.source.tensor.untyped_storage()._cdata
                    readers.setdefault(memory, []).append(view)
        for key in self._tensors:
            # Nobody but this dictionary and the recipe's source, which is a tensor of its own.
            if sys.getrefcount(self._tensors[key]) > 2 or _is_quantized(self._tensors[key]):
                continue
            storage = self._tensors[key].untyped_storage()
            views = readers.get(storage._cdata, [])
            if len(views) != 1 or compat.holders_of(storage) > 3:
                continue
            # Memory that torch has not allocated is somebody's: a file, or an array of NumPy's.
            is_foreign = storage.is_shared() or not storage.resizable()
            if is_foreign or self._tensors[key].is_inference():
                continue
            source = views[0].source
            assert isinstance(source, MemorySource)
            if not is_small_and_odd(storage.data_ptr(), self._tensors[key]):
                views[0].source = _Given(source, self)

    def _kept(
        self,
        slot: Slot,
        promise: LivePromise,
        held: torch.Tensor,
        made: dict[tuple[int, int], torch.Tensor],
    ) -> torch.Tensor:
        """The tensor of an unchanged promise: the one that the slot had, if it fits and stands for
        no other promise. Several of one memory stay several, as TransformerLens made them.
        """
        form = promise.node.geometry  # type: ignore[attr-defined]
        place = (id(promise.home), id(promise))
        if place not in made:
            old = self._tensors.get(_key(slot))
            if (
                old is None
                or id(old) in self._standing
                or not _is_at(old, held, form, promise.requires_grad)
            ):
                view = held.detach().as_strided(form.shape, form.stride(), form.storage_offset())
                old = nn.Parameter(view, promise.requires_grad) if promise._is_param else view
            made[place] = old
            self._standing.add(id(old))
        return made[place]


def _dictionaries(bridge: Any) -> Iterator[dict[str, Any]]:
    """Where TransformerLens keeps what it knows of a bridge and of its weights."""
    yield vars(bridge.adapter)
    for root in (bridge.original_model, bridge):
        for module in nn.Module.modules(root):
            yield from (vars(module), module._modules, module._parameters, module._buffers)


def _without_tensors(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _TENSOR if isinstance(v, torch.Tensor) else v for k, v in entries.items()}


def _is_quantized(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, QuantizedTensor)


def _key(slot: Slot) -> _Key:
    return id(slot.module), slot.kind, slot.leaf


def _is_at(old: torch.Tensor, held: torch.Tensor, form: torch.Tensor, trainable: bool) -> bool:
    return (
        old.untyped_storage()._cdata == held.untyped_storage()._cdata
        and old.storage_offset() == form.storage_offset()
        and old.shape == form.shape
        and old.stride() == form.stride()
        and old.requires_grad == trainable
    )


def _source_of(tensor: Any) -> MemorySource | None:
    """The memory that a promise is all of, as it stands."""
    node = tensor.node if isinstance(tensor, LivePromise) else None
    if not isinstance(node, SourceView) or node.casts or not isinstance(node.source, MemorySource):
        return None
    fills = node.geometry.numel() == node.source.shape.numel()
    return node.source if fills and node.geometry.stride() == tensor.stride() else None
