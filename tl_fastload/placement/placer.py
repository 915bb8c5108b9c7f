"""Puts evaluated recipes into a model: in which order, on which device, mapped, assigned or
copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from tl_fastload.ground.cores import Cores
from tl_fastload.ground.geometry import copied, has_overlap, is_dense, same_layout
from tl_fastload.ground.memory_orders import FORWARD
from tl_fastload.ground.own_defaults import looking_only, without_modes
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.placement.ahead import ReadingAhead
from tl_fastload.placement.finite import FiniteSearch
from tl_fastload.placement.order import groups
from tl_fastload.placement.spread import Spread
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.quantized.quantizer import Quantizer
from tl_fastload.quantized.recipes import QuantizedSource
from tl_fastload.recipes.evaluate import Evaluation, Value, rounds_otherwise, sources
from tl_fastload.recipes.nodes import (
    Call,
    MemorySource,
    Node,
    SourceView,
    as_stored,
    aten,
    meta_of,
)
from tl_fastload.recipes.promise import Promise
from tl_fastload.recipes.spares import Spares
from tl_fastload.report.memory import return_freed_memory
from tl_fastload.report.progress import Progress
from tl_fastload.source.reader import FileMaps, FileSource

# Freed scratch memory is given back each time that this part of the model has passed through it.
_TRIM_FRACTION = 0.01
_TRIM_LEAST_BYTES = 4 << 20
_KEPT_PART = 2  # of what is still to be placed, one part in so many may be memory that is kept
_SEARCH_MOST_BYTES = 16 << 20


@dataclass
class Placer:
    """Places recipes into one model.

    Args:
        model: the model; its parameters give names, shapes and dtypes.
        device_of: target device of each parameter name.
        assign: replace each parameter by the evaluated tensor, or else copy into it.
        maps: where untransformed file ranges are mapped, or None to read everything.
        map_any_layout: map a range even if the forward pass would want other strides, as long as
            it has no gaps.
        progress: told of every placed parameter.
        strides_of: dense strides of a parameter in an order, from the order, the module that owns
            it, its name, and its shape.
        quantizer: makes quantized tensors, or None.
        fresh: nobody holds the model's tensors yet, so that their memory may be replaced.
        order: memory order of the parameters, of `ground.memory_orders.LAYOUTS`.
        map_gaps: map views into fused matrices, too: parameters that are not dense.
        writing: told of every tensor before it is written to or replaced.
        spread: the parts of a model over several devices; None for any other.

    Attributes:
        mapped_bytes: of mapped parameters.
        unseen_bytes: of mapped parameters that were not searched for NaN and infinite values.
        not_finite: parameters with NaN or infinite values.
        rounded_otherwise: parameters that were evaluated on another device than recorded, and sum.
    """

    model: nn.Module
    device_of: Callable[[str], torch.device]
    assign: bool
    maps: FileMaps | None
    map_any_layout: bool
    progress: Progress
    strides_of: Callable[[str, nn.Module, str, torch.Size], tuple[int, ...]]
    quantizer: Quantizer | None = None
    fresh: bool = True
    order: str = FORWARD
    map_gaps: bool = False
    writing: Callable[[str], None] = lambda name: None
    spread: Spread | None = None
    mapped_bytes: int = 0
    unseen_bytes: int = 0
    not_finite: list[str] = field(default_factory=list)
    rounded_otherwise: list[str] = field(default_factory=list)
    _passed_bytes: int = 0
    _trim_bytes: int = _TRIM_LEAST_BYTES

    def __post_init__(self) -> None:
        self.parameters = {name for name, _ in self.model.named_parameters()}
        self._modules = dict(self.model.named_modules(remove_duplicate=False))
        self._spares = Spares()
        self._cores = Cores()
        self._finite = FiniteSearch(self._cores)

    @without_modes()
    def place(self, recipes: dict[str, Promise]) -> None:
        """Evaluate and place every recipe whose name the model has; others were only needed on the
        way. The dictionary is emptied: a recipe is dropped as soon as it is done.
        """
        targets = self.targets()
        todo = self.todo(recipes, targets)
        if self.quantizer is not None:
            for name in self.parameters & recipes.keys() - todo.keys():
                self.quantizer.stays_dense(name, recipes[name])  # the report says why
        recipes.clear()
        total_bytes = sum(bytes_of(targets[name]) for name in todo)
        self._trim_bytes = max(_TRIM_LEAST_BYTES, int(total_bytes * _TRIM_FRACTION))
        self.progress.start(total_bytes)
        self._waiting = _Waiting(todo, targets, self.assign)
        self._views = {
            name: view
            for name, promise in todo.items()
            if (view := self.mappable(name, promise, targets[name])) is not None
        }
        quantized = {name: self._quantized_sources(name, todo[name]) for name in todo}
        readers = Counter(source for read in quantized.values() for source in read)
        try:
            with ReadingAhead(self._spares, self._cores) as ahead:
                for group, begun in self._begun_ahead(todo, targets, ahead):
                    self._place_group({name: todo.pop(name) for name in group}, targets, begun)
                    read = [source for name in group for source in quantized.pop(name)]
                    readers.subtract(read)
                    for source in read:
                        if not readers[source]:
                            source.release()
        except BaseException:
            targets.clear()  # the traceback holds them as long as the exception lives
            self._views.clear()
            self._waiting.forget()
            self._spares.limit(0)
            raise
        self._spares.limit(0)
        self.not_finite = self._finite.not_finite(self.model.get_parameter)
        return_freed_memory()

    def streaming_bytes(self, quantized_bytes: Mapping[str, int]) -> dict[torch.device, int]:
        """What parts that run elsewhere than they lie take there, on each device.

        Args:
            quantized_bytes: sizes of the parameters that will be quantized.
        """
        if self.spread is None:
            return {}
        sizes = {name: bytes_of(tensor) for name, tensor in self.targets().items()}
        return self.spread.streaming_bytes({**sizes, **quantized_bytes})

    def targets(self) -> dict[str, torch.Tensor]:
        """The model's parameters and buffers."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    @looking_only
    def todo(
        self, recipes: dict[str, Promise], targets: dict[str, torch.Tensor]
    ) -> dict[str, Promise]:
        """The recipes that make one of the model's tensors (`targets`) which it does not have
        already.
        """
        return {
            name: promise
            for name, promise in recipes.items()
            if name in targets and not self._stays(name, promise, targets[name])
        }

    def _begun_ahead(
        self, todo: dict[str, Promise], targets: dict[str, torch.Tensor], ahead: ReadingAhead
    ) -> Iterator[tuple[list[str], Evaluation | None]]:
        """Groups in the order of placement, each with what evaluates it if that has begun: reading
        for the next group has as well.
        """
        order = groups(todo)
        fresh = [self._fresh(group) for group in order]
        rest_bytes = sum(bytes_of(targets[name]) for names in fresh for name in names)
        waiting: list[tuple[list[str], Evaluation | None]] = []
        for group, names in zip(order, fresh, strict=True):
            sizes = [bytes_of(targets[name]) for name in names]
            rest_bytes -= sum(sizes)
            begun = None
            # What is kept or read ahead, and what will be placed, never pass what the model takes.
            if names:
                nodes = [todo[name].node for name in names]
                begun = Evaluation(nodes, torch.device("cpu"), self._spares, self._cores)
                ahead.begin(begun, rest_bytes // (2 * _KEPT_PART), sizes)
            waiting.append((group, begun))
            if len(waiting) > 1:
                yield waiting.pop(0)
            self._spares.limit(rest_bytes // _KEPT_PART)
        yield from waiting

    def _fresh(self, group: list[str]) -> list[str]:
        """Parameters of a group that will certainly be evaluated into new memory of the host."""
        if self.quantizer is not None or not self.assign:
            return []
        return [
            name for name in group if name not in self._views and self.device_of(name).type == "cpu"
        ]

    def _quantized_sources(self, name: str, promise: Promise) -> set[QuantizedSource]:
        shift = None if self.quantizer is None else self.quantizer.shifts.get(name)
        promises = [promise] if shift is None else [promise, shift]
        read = (view.source for one in promises for view in sources(one.node))
        return {source for source in read if isinstance(source, QuantizedSource)}

    def _place_group(
        self,
        recipes: dict[str, Promise],
        targets: dict[str, torch.Tensor],
        begun: Evaluation | None,
    ) -> None:
        rest: dict[str, Promise] = {}
        for name, promise in recipes.items():
            ready = self._ready(name, promise, targets[name])
            if ready is None:
                rest[name] = promise
            else:
                self._put_all(self._waiting.add(name, ready))
        by_device: dict[torch.device, dict[str, Promise]] = {}
        for name, promise in rest.items():
            by_device.setdefault(self.device_of(name), {})[name] = promise
        for device, some in by_device.items():
            nodes = {name: self.evaluated(some[name].node, targets[name]) for name in some}
            evaluation = begun
            if evaluation is None or device.type != "cpu":
                evaluation = Evaluation(list(nodes.values()), device, self._spares)
            for name, node in nodes.items():
                if rounds_otherwise(node, some[name].device, device):
                    self.rounded_otherwise.append(name)
                value = evaluation.value(node)
                made = self.finish(name, value, targets[name])
                if self.assign and type(made) is torch.Tensor and not _share(made, value.tensor):
                    evaluation.let_go(value)
                del value
                done = self._waiting.add(name, made)
                del made
                self._put_all(done)

    def _ready(self, name: str, promise: Promise, target: torch.Tensor) -> torch.Tensor | None:
        """The parameter without evaluating its recipe: on quantized bytes, or mapped."""
        quantizer = self.quantizer if name in self.parameters else None
        if not self.fresh and not isinstance(target, QuantizedTensor):
            quantizer = None  # a live parameter stays the kind of tensor that it is
        if quantizer is not None and not quantizer.stays_dense(name, promise):
            return quantizer.keep(name, promise, target.dtype, self.device_of(name))
        mapped = self._map(name)
        if mapped is not None:
            self.mapped_bytes += bytes_of(mapped)
            self._search(name, mapped)
        return mapped

    def _search(self, name: str, mapped: torch.Tensor) -> None:
        # Reading all pages of a big unprocessed model would undo what mapping it saves.
        if self.leaves_unseen(self.mapped_bytes):
            self.unseen_bytes += bytes_of(mapped)
        else:
            self._finite.look(name, mapped)

    def leaves_unseen(self, mapped_bytes: int) -> bool:
        """Whether a mapped parameter is not read, after so many bytes of them."""
        return self.map_any_layout and mapped_bytes > _SEARCH_MOST_BYTES

    def _stays(self, name: str, promise: Promise, target: torch.Tensor) -> bool:
        # A model on the meta device stands for one on the CPU.
        home = "cpu" if target.is_meta else target.device
        return _is_itself(promise, target) and torch.device(home) == self.device_of(name)

    def _map(self, name: str) -> torch.Tensor | None:
        view = self._views.pop(name, None)
        if view is None or self.maps is None or not isinstance(view.source, FileSource):
            return None
        return self.maps.view(view.source.entry, view.geometry)

    @looking_only
    def mappable(self, name: str, promise: Promise, target: torch.Tensor) -> SourceView | None:
        """The part of a file that is this parameter as it stands, if it may be mapped."""
        if self.maps is None or not self.assign:
            return None
        node = as_stored(promise.node) if self.map_gaps else promise.node
        if not isinstance(node, SourceView):
            return None
        if node.casts or not isinstance(node.source, FileSource) or has_overlap(node.geometry):
            return None
        if self.device_of(name).type != "cpu" or node.dtype != target.dtype:
            return None
        aligned = node.source.entry.offset % target.element_size() == 0
        if node.geometry.shape != target.shape or not aligned:
            return None
        strides, wanted = node.geometry.stride(), self.strides(name, target.shape)
        fits = same_layout(target.shape, strides, wanted)
        if self.map_any_layout and self.order == FORWARD:
            # Fused optimizers walk a parameter's memory without its strides, and saving one that
            # has gaps saves what lies in them.
            fits = fits or self.map_gaps or is_dense(node.geometry)
        return node if fits else None

    def strides(self, name: str, shape: torch.Size) -> tuple[int, ...]:
        return self.strides_of(self.order, self._modules[name.rpartition(".")[0]], name, shape)

    @property
    def _copies(self) -> bool:
        return not self.assign and self.quantizer is None

    def evaluated(self, node: Node, target: torch.Tensor) -> Node:
        """The step of a recipe to evaluate: a last cast is left to the copying, which rounds the
        same and needs no memory for it.
        """
        is_cast = isinstance(node, Call) and node.func is aten._to_copy.default
        if not self._copies or not is_cast or meta_of(node).dtype != target.dtype:
            return node
        before: Node = node.args[0]  # type: ignore[attr-defined]
        return before if isinstance(before, Call) else node  # what is read is cast on the way

    def finish(self, name: str, value: Value, target: torch.Tensor) -> torch.Tensor:
        """The tensor to place: right dtype and layout, memory of its own."""
        tensor: torch.Tensor = value.tensor
        if tensor.shape != target.shape:
            # One number: torch's own load_state_dict takes shape (1,) for () as well.
            tensor = tensor.reshape(target.shape)
        if name in self.parameters and not self._copies:
            self._finite.look(name, tensor)
        if self.quantizer is not None and name in self.parameters:
            made = self.quantizer.quantize(name, tensor.to(target.dtype))
            if made is not None:
                return made
        if not self.assign:
            return tensor
        strides = self.strides(name, tensor.shape)
        size = bytes_of(tensor)
        if (
            value.buffer.owned
            and tensor.dtype == target.dtype
            and tensor.untyped_storage().nbytes() == size
            and same_layout(tensor.shape, tensor.stride(), strides)
        ):
            value.buffer.owned = False  # this parameter owns it from now on
            return tensor
        with self._cores.beside_helpers():
            return copied(tensor, strides, target.dtype, self._spares.empty)

    def _put_all(self, done: list[tuple[str, torch.Tensor]]) -> None:
        while done:
            self._put(*done.pop())

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        parent_name, _, leaf = name.rpartition(".")
        find = self._modules.__getitem__ if self.assign else self.model.get_submodule
        parent = find(parent_name)
        self.writing(name)
        with torch.no_grad():
            if leaf in parent._buffers:
                buffer = parent._buffers[leaf]
                if buffer is not None:
                    _write(buffer, tensor)
            elif self.assign:
                old = parent._parameters[leaf]
                needs_grad = old is None or old.requires_grad
                needs_grad = needs_grad and not isinstance(tensor, QuantizedTensor)
                parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=needs_grad)
            else:
                target = parent._parameters[leaf]
                if target is not None:
                    if self.fresh:
                        # Not all at once before the first is placed: kernels need room as well.
                        strides = self.strides(name, target.shape)
                        target.data = torch.empty_strided(
                            target.shape, strides, dtype=target.dtype, device=tensor.device
                        )
                    _write(target, tensor)
                    tensor = target
                    if self._copies:
                        self._finite.look(name, target)
        size_bytes = bytes_of(tensor)
        del tensor
        self.progress.advance(name, size_bytes)
        self._passed_bytes += size_bytes
        if self._passed_bytes > self._trim_bytes:
            self._passed_bytes = 0
            return_freed_memory()


def _share(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _write(target: torch.Tensor, values: torch.Tensor) -> None:
    # Tensors that were made in inference mode can be written to in that mode only.
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        target.copy_(values)


class _Waiting:
    """Holds results back until no pending recipe reads the memory that they will overwrite."""

    def __init__(
        self, recipes: dict[str, Promise], targets: dict[str, torch.Tensor], assign: bool
    ) -> None:
        self._done: dict[str, torch.Tensor] = {}
        self._pending: Counter[str] = Counter()  # readers to come, of each name
        self._reads: dict[str, set[str]] = {}
        if assign:
            return
        in_memory = (name for name in recipes if not isinstance(targets[name], QuantizedTensor))
        owner = {targets[name].untyped_storage().data_ptr(): name for name in in_memory}
        for name, promise in recipes.items():
            memories = (view.source for view in sources(promise.node))
            read = {
                owner.get(source.tensor.untyped_storage().data_ptr(), name)
                for source in memories
                if isinstance(source, MemorySource)
            }
            self._reads[name] = read - {name}
            self._pending.update(self._reads[name])

    def add(self, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Take a result; give back those that may be written now."""
        self._done[name] = tensor
        read = self._reads.pop(name, set())
        self._pending.subtract(read)
        ready = [one for one in (*read, name) if one in self._done and not self._pending[one]]
        return [(one, self._done.pop(one)) for one in ready]

    def forget(self) -> None:
        """Let go of what was made and not placed."""
        self._done.clear()


def _is_itself(promise: Promise, target: torch.Tensor) -> bool:
    """Whether a recipe only says that a tensor of the model keeps its value."""
    node = promise.node
    return (
        isinstance(node, SourceView)
        and not node.casts
        and isinstance(node.source, MemorySource)
        and node.source.tensor.data_ptr() == target.data_ptr()
        and int(node.geometry.storage_offset()) == 0
        and node.geometry.shape == target.shape
        and node.geometry.stride() == target.stride()
    )
