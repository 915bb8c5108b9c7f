"""What a format is: bytes that multiply, and a description of how they are stored and made.

A format is one module: a class of bytes, and a `Format` that `formats.FORMATS` lists. Bytes declare
their fields once, as a dataclass; moving, copying, counting and saving are derived from that
declaration (`tensors`, `plain`, `map`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F

from tl_fastload.errors import QuantizationError
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.quantized.spec import Spec
from tl_fastload.quantized.views import untraced

if TYPE_CHECKING:
    from typing_extensions import Self

Part = TypeVar("Part", bound="Declared")
Bytes = TypeVar("Bytes", bound="QuantizedBytes")


class Declared:
    """A dataclass whose fields are tensors, other such dataclasses, and plain values."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor in it, by the name of its field."""
        found: dict[str, torch.Tensor] = {}
        for name, value in self._values().items():
            if isinstance(value, torch.Tensor):
                found[name] = value
            elif isinstance(value, Declared):
                found.update(value.tensors())
        return found

    def plain(self) -> dict[str, Any]:
        """Its own fields that hold plain values, by name."""
        values = self._values()
        return {k: v for k, v in values.items() if not isinstance(v, (torch.Tensor, Declared))}

    def map(self: Part, change: Callable[[torch.Tensor], torch.Tensor]) -> Part:
        """The same thing with every tensor replaced by `change(tensor)`."""
        changed: dict[str, Any] = {}
        for name, value in self._values().items():
            if isinstance(value, torch.Tensor):
                changed[name] = change(value)
            elif isinstance(value, Declared):
                changed[name] = value.map(change)
        return replace(self, **changed)  # type: ignore[type-var]

    def nbytes(self) -> int:
        """Bytes that the elements of all tensors occupy."""
        return sum(bytes_of(t) for t in self.tensors().values())

    def _values(self) -> dict[str, Any]:
        named = fields(self)  # type: ignore[arg-type]  # the base is no dataclass itself
        return {field.name: getattr(self, field.name) for field in named}


class QuantizedBytes(Declared, ABC):
    """The bytes of one `[out, in]` matrix, with everything that turns them back into numbers.

    A subclass is a frozen dataclass (`eq=False`). Its fields must not be called as those of
    `content.Content` that hold tensors are (`in_scale`, `in_shift`, `out_shift`).

    Attributes:
        tag: names the class in files; belongs to one class of one format.
        shape: (out, in) of the matrix, whatever the shapes of the tensors.
        kind: of its `Spec`, such as "nf4".
        rounds_activations: whether `linear` rounds what it multiplies by, and so depends on where
            activations lie; it then gets them as the weights were quantized for.
    """

    tag: ClassVar[str]
    rounds_activations: ClassVar[bool] = False
    shape: tuple[int, int]
    kind: str

    @abstractmethod
    def rows(self, index: torch.Tensor) -> QuantizedBytes:
        """The bytes of some rows; a run of successive rows is shared, not copied.

        Args:
            index: [n] row numbers on the CPU, in the order wanted.

        Raises:
            QuantizationError: the rows cannot be taken out without quantizing again.
        """

    def run(self, numbers: range) -> QuantizedBytes:
        """`rows` of numbers that are equally far apart, in ascending order."""
        with untraced():
            index = torch.arange(numbers.start, numbers.stop, numbers.step, device="cpu")
        return self.rows(index)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Matrices of equally many columns, the rows of one below those of the other; bytes are
        copied.

        Raises:
            QuantizationError: they cannot be one matrix without quantizing again.
        """
        raise QuantizationError(f"{parts[0].kind} weights cannot be put below each other as bytes")

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [out, in] that `linear` multiplies by, a new tensor; on the meta device of
        bytes that are there.
        """

    def linear(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """`x @ W.T + bias`; gradients reach `x` and `bias`. Without a kernel, by dequantizing.

        Args:
            x: [..., in] activations.
            bias: [out], or None.
            compute_dtype: what a kernel that has a choice multiplies in; None for x's own dtype.

        Returns:
            [..., out], in x's dtype.
        """
        return F.linear(x, self.dense(x.dtype), None if bias is None else bias.to(x.dtype))

    def requantize(self, dense: torch.Tensor) -> QuantizedBytes:
        """Other values quantized as these are.

        Args:
            dense: [out, in], floating point; on the meta device for sizes alone.

        Raises:
            QuantizationError: the format's bytes are only read, not made.
        """
        raise QuantizationError(
            f"{self.kind} weights cannot be quantized again. Merge into ordinary weights with "
            "dequantize=True, or into the unquantized checkpoint, with quantize= if they are too "
            "large."
        )

    @property
    def default_dtype(self) -> torch.dtype:
        """What the matrix computes in unless told: the dtype that was quantized, if known."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return next(iter(self.tensors().values())).device


class Format(ABC):
    """One way to store matrices as bytes. What a subclass leaves out, the format cannot do.

    Attributes:
        name: for messages.
        kinds: the kinds of its specs and bytes.
        stores: its classes of bytes.
        spec: its class of specs.
        pieces: end of a stored tensor's name -> end of its weight's name in transformers' model,
            for tensors that only quantized weights have: `{".SCB": ".weight"}`, or
            `{"_blocks": "", "_scales": ""}`. A tensor under the weight's own name is a piece, too.
        codes: dtypes in which only quantized weights are stored under their own name; such a
            `.weight` is quantized, with or without pieces.
        ignored: ends of the names of stored tensors that a runtime needs and the weights do not,
            such as scales of activations.
        descriptions: pieces of a few bytes, whose values have to be known to plan.
        undeclared: piece -> what config.json lacks where one stands alone.
        offered: what `quantize=` may say -> kind, for formats that quantize.
        advised: of these, what to propose for a model that does not fit, largest first.
        remedy: what to do where its kernels do not work.
        foreign: classes of layers in memory, or names of tensors in them, whose bytes are not read
            -> what is the matter.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    stores: ClassVar[tuple[type[QuantizedBytes], ...]]
    spec: ClassVar[type[Spec]] = Spec
    pieces: ClassVar[Mapping[str, str]] = {}
    codes: ClassVar[frozenset[torch.dtype]] = frozenset()
    ignored: ClassVar[frozenset[str]] = frozenset()
    descriptions: ClassVar[frozenset[str]] = frozenset()
    undeclared: ClassVar[Mapping[str, str]] = {}
    offered: ClassVar[Mapping[str, str]] = {}
    advised: ClassVar[tuple[str, ...]] = ()
    remedy: ClassVar[str] = ""
    foreign: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def declared(self, fields: Mapping[str, Any]) -> Spec | None:
        """What the `quantization_config` of a checkpoint says; None if it is another format's.

        Raises:
            ArgumentError: it contradicts itself.
        """

    def asked(self, fields: Mapping[str, Any]) -> Spec | None:
        """What a configuration object, passed as `quantize=`, asks for; None if another format.

        Raises:
            ArgumentError: it contradicts itself.
        """
        return None

    @abstractmethod
    def assemble(self, pieces: Mapping[str, torch.Tensor], spec: Spec) -> QuantizedBytes:
        """The bytes of one weight, sharing the memory of its pieces.

        Args:
            pieces: by name: the end of the stored name as in `pieces` without its first character
                ("SCB", "blocks"), or the last part of the weight's own name ("weight"). The first
                time all of them but the descriptions are on the meta device.
            spec: what the checkpoint declares.

        Raises:
            QuantizationError: pieces missing, misshapen or unreadable; need not name the weight.
        """

    def as_parameter(self, matrix: Any, pieces: Mapping[str, torch.Tensor]) -> Any:
        """The matrix [out, in] as the parameter that transformers' model has, by views alone: where
        that one is transposed, or has the experts in a dimension of its own, as the piece has that
        is largest.
        """
        stored = max(pieces.values(), key=torch.Tensor.numel)
        return matrix.view(len(stored), -1, matrix.shape[1]) if stored.dim() == 3 else matrix

    def of_layer(self, module: Any) -> tuple[QuantizedBytes, torch.dtype | None] | None:
        """The bytes of a quantized layer in memory, shared, and the dtype that it multiplies in if
        not the activations'; None for others.

        Raises:
            QuantizationError: not quantized yet, scales missing or misshapen, no kernel here.
        """
        return None

    def quantize(self, dense: torch.Tensor, spec: Spec) -> QuantizedBytes:
        """Quantize a matrix [out, in], floating point, on its device; of one on the meta device,
        the sizes.

        Raises:
            QuantizationError: settings or values that cannot be, or no kernel here.
        """
        raise QuantizationError(
            f"{spec.kind} weights can be loaded, but not made: take a checkpoint that has them."
        )

    def sample(self, kind: str, device: torch.device) -> QuantizedBytes:
        """A small matrix of a kind, [64, 128], to try whether products work.

        Raises:
            QuantizationError: no kernel here.
        """
        generator = torch.Generator().manual_seed(0)
        dense = torch.randn(64, 128, generator=generator, device="cpu").to(device)
        return self.quantize(dense, self.spec(kind))

    def require_device(self, device: torch.device) -> None:  # noqa: B027  # without kernels: none
        """Check that products can be computed on a device.

        Raises:
            QuantizationError: they cannot; says what to do.
        """


@untraced()
def runs_of(index: torch.Tensor) -> list[tuple[int, int]]:
    """Row numbers as runs of successive ones: (first, last + 1)."""
    if index.numel() == 0:
        return [(0, 0)]
    breaks = (torch.nonzero(index[1:] != index[:-1] + 1).flatten() + 1).tolist()
    edges = [0, *breaks, index.numel()]
    firsts = index[torch.tensor(edges[:-1], device="cpu")].tolist()
    return [
        (first, first + stop - start)
        for first, start, stop in zip(firsts, edges[:-1], edges[1:])  # noqa: B905  # one length
    ]


def join_rows(parts: Sequence[Bytes], by_rows: Collection[str], **changed: Any) -> Bytes:
    """Bytes of several matrices below each other.

    Args:
        parts: equal in what is neither `by_rows` nor `changed`.
        by_rows: fields whose tensors have the rows in their first dimension.
        **changed: fields that are others then.

    Raises:
        QuantizationError: they differ in something.
    """
    joined = dict(changed)
    for name in [name for name in parts[0]._values() if name not in changed]:
        values = [getattr(part, name) for part in parts]
        is_tensor = [isinstance(value, torch.Tensor) for value in values]
        if name in by_rows and all(is_tensor):
            same = len({(value.dtype, value.shape[1:]) for value in values}) == 1
            joined |= {name: torch.cat(values)} if same else {}
        else:
            # Orders of columns are a matrix's own.
            same = not any(is_tensor) and all(value == values[0] for value in values)
        if not same:
            raise QuantizationError(
                f"it is put together of {parts[0].kind} matrices that differ in their {name}"
            )
    return replace(parts[0], **joined)  # type: ignore[type-var]


def take(tensor: torch.Tensor, runs: list[tuple[int, int]]) -> torch.Tensor:
    """Runs of the first dimension, one after the other: a view of one run, a copy of several."""
    parts = [tensor[start:stop] for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def take_rows(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Some rows of a tensor: a view of rows that are equally far apart, else a copy.

    Args:
        tensor: [rows, ...].
        index: [n] row numbers on the CPU, in the order wanted.
    """
    step = _step(index)
    if step is not None:
        return tensor[int(index[0]) : int(index[-1]) + 1 : step]
    runs = runs_of(index)
    if len(runs) * 4 > len(index):  # mostly single rows
        return tensor.index_select(0, index.to(tensor.device))
    return take(tensor, runs)


@untraced()
def _step(index: torch.Tensor) -> int | None:
    """The distance of row numbers that are equally far apart, in ascending order; else None."""
    if index.numel() < 2:
        return 1 if index.numel() else None
    steps = index[1:] - index[:-1]
    step = int(steps[0])
    return step if step > 0 and bool((steps == step).all()) else None


def damaged(what: str) -> QuantizationError:
    """The error for weights whose pieces are not there, or do not fit each other."""
    return QuantizationError(f"{what}. Save or download the checkpoint again.")


def describe(tensor: torch.Tensor | None) -> str:
    """Shape and dtype, for messages."""
    return "nothing" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
