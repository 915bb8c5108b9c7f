"""How much memory placing will take, found by rehearsing it on tensors without memory.

The recipes of each group of parameters are evaluated by the evaluator itself, in the order of
`tl_fastload.placement.placer`, but on the meta device, where every operation runs and no memory is
allocated. What each would allocate is added up while it is alive. Groups of one form (the same
matrix in every layer) are rehearsed once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tl_fastload.ground.geometry import is_dense, span
from tl_fastload.ground.own_defaults import looking_only
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.placement.order import groups
from tl_fastload.placement.placer import Placer
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.quantized.content import Content
from tl_fastload.quantized.recipes import QuantizedSource
from tl_fastload.recipes.evaluate import Evaluation
from tl_fastload.recipes.nodes import Call, MemorySource, Node, Pick, Source, SourceView
from tl_fastload.recipes.promise import Promise
from tl_fastload.source.pinned import SLOT_BYTES, SLOTS, bus_to
from tl_fastload.source.reader import CHUNK_BYTES, HELD_SPAN_BYTES, WINDOW_BYTES

META = torch.device("meta")
_LARGE_BYTES = 1 << 20
_CUDA_GRAIN_BYTES = 512  # torch's CUDA allocator hands out multiples of this


@dataclass
class Forecast:
    """What placing recipes will take, in bytes.

    Attributes:
        held_bytes: parameter or buffer -> what it will hold in memory of its own.
        mapped_bytes: parameter -> what of it is mapped from a file.
        quantized_bytes: quantized parameter -> its bytes, wherever they lie.
        peak_bytes: device -> highest total, parameters included, while they are placed.
        seen_bytes: of mapped parameters, what is read while loading, so that it is resident.
        seen_parameters: how many of them are large.
        scratch_bytes: the reader's buffer on the host.
    """

    held_bytes: dict[str, int] = field(default_factory=dict)
    mapped_bytes: dict[str, int] = field(default_factory=dict)
    quantized_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[torch.device, int] = field(default_factory=dict)
    seen_bytes: int = 0
    seen_parameters: int = 0
    scratch_bytes: int = 0


def forecast(placer: Placer, recipes: dict[str, Promise]) -> Forecast:
    """Rehearse `placer.place(recipes)`; nothing is read, placed or changed."""
    return _Rehearsal(placer).run(recipes)


@dataclass(frozen=True)
class _Outcome:
    """What one group takes: for each of its parameters bytes of memory, and of the quantized
    tensor if it becomes one; the highest total; the reader's scratch.
    """

    held: tuple[int, ...]
    quantized: tuple[int | None, ...]
    peak: int
    scratch: int


class _Rehearsal:
    def __init__(self, placer: Placer) -> None:
        self.placer = placer
        self.targets = placer.targets()
        self.found = Forecast()
        self._placed: dict[torch.device, int] = {}
        self._known: dict[Any, _Outcome] = {}
        self._mapped = 0

    def run(self, recipes: dict[str, Promise]) -> Forecast:
        todo = self.placer.todo(recipes, self.targets)
        for group in groups(todo):
            by_device: dict[torch.device, list[str]] = {}
            for name in group:
                if not self._map(name, todo[name]):
                    by_device.setdefault(self.placer.device_of(name), []).append(name)
            for device, names in by_device.items():
                self._place({name: todo[name] for name in names}, device)
        return self.found

    def _map(self, name: str, promise: Promise) -> bool:
        if self._is_quantized(name, promise):
            return False
        target = self.targets[name]
        if self.placer.mappable(name, promise, target) is None:
            return False
        size = bytes_of(target)
        self.found.mapped_bytes[name] = size
        self._mapped += size
        if not self.placer.leaves_unseen(self._mapped):
            self.found.seen_bytes += size
            self.found.seen_parameters += size > _LARGE_BYTES
        return True

    def _is_quantized(self, name: str, promise: Promise) -> bool:
        quantizer = self.placer.quantizer
        if quantizer is None or name not in self.placer.parameters:
            return False
        return not quantizer.stays_dense(name, promise)

    def _quantized_as(self, name: str, promise: Promise) -> tuple[tuple[int, ...], int] | None:
        """The form of the matrix that is quantized; None if none is."""
        quantizer = self.placer.quantizer
        if quantizer is None or not self._is_quantized(name, promise):
            return None
        role = quantizer.role(name)
        return role.order, role.n_outputs

    def _place(self, recipes: dict[str, Promise], device: torch.device) -> None:
        key = self._form(recipes, device)
        if key not in self._known:
            self._known[key] = self._rehearse(recipes, device)
        self._note(list(recipes), device, self._known[key])

    @looking_only
    def _form(self, recipes: dict[str, Promise], device: torch.device) -> Any:
        """What the outcome of a group depends on."""
        outline = _Outline(device)
        facts = []
        for name, promise in recipes.items():
            target = self.targets[name]
            facts.append(
                (
                    outline.add(promise.node),
                    outline.add(shift.node) if (shift := self._shift(name)) is not None else None,
                    target.dtype,
                    target.shape,
                    self.placer.strides(name, target.shape),
                    self._quantized_as(name, promise),
                )
            )
        return device.type, tuple(facts), tuple(outline.steps)

    def _shift(self, name: str) -> Promise | None:
        quantizer = self.placer.quantizer
        return None if quantizer is None else quantizer.shifts.get(name)

    def _note(self, names: list[str], device: torch.device, outcome: _Outcome) -> None:
        before = self._placed.get(device, 0)
        highest = max(self.found.peak_bytes.get(device, 0), before + outcome.peak)
        self.found.peak_bytes[device] = highest
        self._placed[device] = before + sum(outcome.held)
        self.found.scratch_bytes = max(self.found.scratch_bytes, outcome.scratch)
        for name, held, quantized in zip(names, outcome.held, outcome.quantized, strict=True):
            self.found.held_bytes[name] = held
            if quantized is not None:
                self.found.quantized_bytes[name] = quantized

    def _rehearse(self, recipes: dict[str, Promise], device: torch.device) -> _Outcome:
        """Do with stand-ins what `Placer` does with a group."""
        stage = _Stage(device)
        nodes = {n: self.placer.evaluated(p.node, self.targets[n]) for n, p in recipes.items()}
        played = {name: stage.copy(node) for name, node in nodes.items()}
        made: dict[str, torch.Tensor] = {}
        held: dict[str, int] = {}
        with torch.no_grad(), _Counter(device) as counter:
            for name, promise in recipes.items():
                if self._is_quantized(name, promise):
                    kept = self._keep(name, promise, played[name], stage)
                    if kept is not None:
                        made[name] = kept
                        held[name] = counter.keep(kept)
            rest = [name for name in recipes if name not in made]
            evaluation = Evaluation([played[name] for name in rest], META)
            for name in rest:
                made[name] = self._finish(name, evaluation.value(played[name]))
                held[name] = counter.keep(made[name])
        return _Outcome(
            held=tuple(held[name] for name in recipes),
            quantized=tuple(_quantized_bytes(made[name]) for name in recipes),
            peak=counter.peak,
            scratch=stage.scratch.bytes,
        )

    def _keep(self, name: str, promise: Promise, node: Node, stage: _Stage) -> torch.Tensor | None:
        quantizer = self.placer.quantizer
        if quantizer is None:
            return None
        shift = self._shift(name)
        shifts = {} if shift is None else {name: _promise_of(stage.copy(shift.node), shift)}
        own = type(quantizer)(quantizer.spec, quantizer.role, shifts)
        kept = own.keep(name, _promise_of(node, promise), self.targets[name].dtype, META)
        quantizer.not_quantized.update(own.not_quantized)
        return kept

    def _finish(self, name: str, value: Any) -> torch.Tensor:
        target = self.targets[name]
        tensor = self.placer.finish(name, value, target)
        if self.placer.assign or isinstance(tensor, QuantizedTensor):
            return tensor
        # A copying load makes room for the parameter now, and copies into it.
        return torch.empty(target.shape, dtype=target.dtype, device=META)


class _Outline:
    """The form of recipes: equal for recipes that differ in nothing but which weights they read."""

    def __init__(self, device: torch.device) -> None:
        self.steps: list[Any] = []
        self._device = device
        self._places: dict[Node, int] = {}
        self._sources: dict[int, int] = {}

    def add(self, node: Node) -> int:
        """Number of a node among the steps, after those that it takes."""
        if node not in self._places:
            step = self._step(node)
            self._places[node] = len(self.steps)
            self.steps.append(step)
        return self._places[node]

    def _step(self, node: Node) -> Any:
        if isinstance(node, SourceView):
            source, geometry = node.source, node.geometry
            number = self._sources.setdefault(id(source), len(self._sources))
            is_lent = _is_lent(source, self._device)
            stored = None
            if isinstance(source, QuantizedSource):
                # Of one shape, layers may be quantized to other sizes, or in other ways.
                stored = (source.outline.nbytes(), str(source.outline.plain()))
            kind = (type(source), source.dtype, source.shape, is_lent, stored)
            return (number, kind, geometry.shape, geometry.stride(), node.casts)
        if isinstance(node, Pick):
            return ("pick", self.add(node.call), node.index)
        if not isinstance(node, Call):
            raise TypeError(f"not a recipe: {node!r}")
        kwargs = tuple((name, self._plain(value)) for name, value in node.kwargs.items())
        return (node.func, self._plain(node.args), kwargs)

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Node):
            return ("node", self.add(value))
        if isinstance(value, (tuple, list)):
            return tuple(self._plain(inner) for inner in value)
        return value


@dataclass
class _Scratch:
    """What reading would take on the host, beside the values: the most at a time."""

    bytes: int = 0

    def read(self, size: int) -> None:
        self.bytes = max(self.bytes, size)


class _Stage:
    """Copies of recipes that read nothing: stand-ins take the place of their sources."""

    def __init__(self, device: torch.device) -> None:
        # Apart from the stage, which holds the stand-ins: a cycle would keep the recipes alive.
        self.scratch = _Scratch()
        self._device = device
        self._nodes: dict[Node, Node] = {}
        self._sources: dict[int, Source] = {}

    def copy(self, node: Node) -> Node:
        if node not in self._nodes:
            self._nodes[node] = self._copy(node)
        return self._nodes[node]

    def _copy(self, node: Node) -> Node:
        if isinstance(node, SourceView):
            if id(node.source) not in self._sources:
                self._sources[id(node.source)] = self._stand_in(node.source)
            return SourceView(self._sources[id(node.source)], node.geometry, node.casts)
        if isinstance(node, Pick):
            call = self.copy(node.call)
            return Pick(call, node.index)  # type: ignore[arg-type]
        kwargs = {name: self._filled(value) for name, value in node.kwargs.items()}  # type: ignore[attr-defined]
        return Call(node.func, self._filled(node.args), kwargs, node.meta)  # type: ignore[attr-defined]

    def _filled(self, value: Any) -> Any:
        if isinstance(value, Node):
            return self.copy(value)
        if isinstance(value, (tuple, list)):
            return type(value)(self._filled(inner) for inner in value)
        return META if isinstance(value, torch.device) else value

    def _stand_in(self, source: Source) -> Source:
        is_lent = _is_lent(source, self._device)
        if isinstance(source, QuantizedSource):
            return _quantized_stand_in(source, is_lent)
        return _StandIn(source, is_lent, self._device, self.scratch)


class _StandIn(Source):
    """A source without values."""

    def __init__(
        self, source: Source, is_lent: bool, device: torch.device, scratch: _Scratch
    ) -> None:
        self._on_host = device.type == "cpu"
        self._has_bus = bus_to(device) is not None
        self.name, self.shape, self.stride = source.name, source.shape, source.stride
        self.dtype = source.dtype
        self._is_file = not isinstance(source, MemorySource)
        self._scratch = scratch
        self._lent = None
        if is_lent:
            self._lent = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=META)

    def lend(self, geometry: torch.Tensor) -> torch.Tensor | None:
        if self._lent is None:
            return None
        offset = geometry.storage_offset()
        return self._lent.as_strided(geometry.shape, geometry.stride(), offset)

    def read_into(
        self, out: torch.Tensor, geometry: torch.Tensor, casts: tuple[torch.dtype, ...]
    ) -> None:
        """Nothing to read; what it would take is a piece of the file, and that piece cast."""
        if self._has_bus and self._is_file:
            self._send(out, geometry, casts)
            return
        size = bytes_of(geometry)
        held = 0
        if self._is_file:
            dense = out.stride() == geometry.stride()
            touched = size if dense else span(geometry) * geometry.element_size()
            size = min(touched, CHUNK_BYTES if dense else HELD_SPAN_BYTES)
            held = 0 if dense and not casts and self._on_host else size
        count = size // geometry.element_size()
        if self._on_host:
            for dtype in casts[:-1]:
                torch.empty(count, dtype=dtype, device=META)  # counted, and gone
        self._scratch.read(held)

    def _send(
        self, out: torch.Tensor, geometry: torch.Tensor, casts: tuple[torch.dtype, ...]
    ) -> None:
        self._scratch.read(SLOTS * SLOT_BYTES)
        if casts or not is_dense(geometry) or out.stride() != geometry.stride():
            size = min(span(geometry) * geometry.element_size(), WINDOW_BYTES)
            window = torch.empty(size, dtype=torch.uint8, device=META)
            for dtype in casts[:-1]:
                torch.empty(size // geometry.element_size(), dtype=dtype, device=META)
            del window


def _quantized_stand_in(source: QuantizedSource, is_lent: bool) -> QuantizedSource:
    outline = source.outline

    def load() -> QuantizedTensor:
        stored = outline if is_lent else outline.map(torch.empty_like)
        return QuantizedTensor(Content(stored), None, source.dtype)

    home, dense = source.home, source.dense
    return QuantizedSource(load, source.dtype, source.name, outline, home, dense=dense)


def _is_lent(source: Source, device: torch.device) -> bool:
    """Whether the values lie where they are needed already, and take no memory to get at."""
    home = source.tensor.device if isinstance(source, MemorySource) else None
    if isinstance(source, QuantizedSource):
        home = source.home
    if home is None:
        return False
    if home.type in ("meta", "cpu"):
        return device.type == "cpu"
    return device.type == home.type and (device.index or 0) == (home.index or 0)


def _promise_of(node: Node, like: Promise) -> Promise:
    return Promise(node, like.meta, META)


class _Counter(TorchDispatchMode):
    """Adds up the storages that operations make, as long as each is alive.

    Attributes:
        peak: the highest sum.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._grain = _CUDA_GRAIN_BYTES if device.type == "cuda" else 1
        self._alive: dict[int, tuple[Any, int]] = {}
        self._kept: dict[int, int] = {}
        self._kept_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if type(x) is torch.Tensor}
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if type(made) is torch.Tensor:
                self._see(made.untyped_storage(), given)
        return result

    def _see(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        is_known = key in given or key in self._kept
        if is_known or (key in self._alive and not self._alive[key][0].expired()):
            return
        size = -(-storage.nbytes() // self._grain) * self._grain
        self._alive = {k: found for k, found in self._alive.items() if not found[0].expired()}
        self._alive[key] = (StorageWeakRef(storage), size)  # type: ignore[no-untyped-call]
        alive_bytes = sum(size for _, size in self._alive.values())
        self.peak = max(self.peak, self._kept_bytes + alive_bytes)

    def keep(self, tensor: torch.Tensor) -> int:
        """What a tensor that outlives the counting holds of the memory that was counted."""
        content = getattr(tensor, "content", None)
        parts = [tensor] if content is None else list(content.tensors().values())
        keys = {part.untyped_storage()._cdata for part in parts}
        for key in keys & self._alive.keys():
            self._kept[key] = self._alive.pop(key)[1]
            self._kept_bytes += self._kept[key]
        return sum(self._kept.get(key, 0) for key in keys)


def _quantized_bytes(tensor: torch.Tensor) -> int | None:
    return tensor.nbytes_stored() if isinstance(tensor, QuantizedTensor) else None
