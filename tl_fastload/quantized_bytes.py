"""What a quantized matrix is made of, and how to take some of its rows. Knows no kernel.

Every class declares its fields once, as a dataclass; moving, copying, counting and saving are
derived from that declaration (`tensors`, `plain`, `map`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch

from tl_fastload.errors import QuantizationError
from tl_fastload.tracing import runs_untraced

Part = TypeVar("Part", bound="Declared")

# The sizes of the groups of doubly quantized scales that bitsandbytes can expand, largest first.
_NESTED_BLOCKSIZES = (256, 128, 64)

# The values of bitsandbytes' 4-bit types, float32. Its kernels have them built in.
_CODES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
        *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
        *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
    ),
}


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

    def _values(self) -> dict[str, Any]:
        named = fields(self)  # type: ignore[arg-type]  # the base is no dataclass itself
        return {field.name: getattr(self, field.name) for field in named}


class QuantizedBytes(Declared, ABC):
    """The bytes of one `[out, in]` matrix, with everything that turns them back into numbers.

    Attributes:
        shape: (out, in) of the matrix.
        kind: "int8", "nf4" or "fp4".
    """

    tag: ClassVar[str]
    shape: tuple[int, int]
    kind: str

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the bytes are."""

    @abstractmethod
    def rows(self, index: torch.Tensor) -> QuantizedBytes:
        """The bytes of some rows; a run of successive rows is shared, not copied.

        Args:
            index: [n] row numbers on the CPU, in the order wanted.

        Raises:
            QuantizationError: the rows cannot be taken out without quantizing again.
        """

    def nbytes(self) -> int:
        """Bytes that the elements of all tensors occupy."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


@dataclass(frozen=True, eq=False)
class Int8Bytes(QuantizedBytes):
    """int8 rows: the matrix is `codes * scales[:, None] / 127`.

    Attributes:
        codes: [out, in] int8.
        scales: [out] float32, the largest magnitude of each row (bitsandbytes' SCB).
        threshold: activations from here on are outliers, whose columns are multiplied unquantized;
            0 for none.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    threshold: float = 6.0

    tag: ClassVar[str] = "int8"

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int8 or self.codes.dim() != 2:
            raise QuantizationError(
                f"8-bit weights must be a matrix of int8, not {_describe(self.codes)}."
            )
        if self.scales.dtype != torch.float32 or self.scales.shape != self.codes.shape[:1]:
            raise QuantizationError(
                f"8-bit weights {_describe(self.codes)} need one float32 scale (SCB) per row, "
                f"{self.codes.shape[0]} in all, not {_describe(self.scales)}."
            )

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def kind(self) -> str:  # type: ignore[override]
        return "int8"

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def rows(self, index: torch.Tensor) -> Int8Bytes:
        runs = runs_of(index)
        return replace(self, codes=take(self.codes, runs), scales=take(self.scales, runs))


@dataclass(frozen=True, eq=False)
class FourBitBytes(QuantizedBytes):
    """Packed 4-bit blocks: value number i is `code[nibble i] * absmax[i // blocksize]`, rows one
    after the other.

    With double quantization, `absmax` is uint8 itself, and stands for
    `nested_code[absmax[j]] * nested_absmax[j // nested_blocksize] + nested_offset`.

    Attributes:
        packed: [n, 1] uint8, two values each, the first in the high half.
        absmax: [blocks] float32, or uint8 if doubly quantized.
        code: [16] float32.
        shape: (out, in) of the matrix.
        blocksize: values per block.
        quant_type: "nf4" or "fp4".
        quant_dtype: dtype of the matrix that was quantized.
        nested_absmax: [groups] float32, or None.
        nested_code: [256] float32, or None.
        nested_offset: [] float32, or None.
        nested_blocksize: blocks per group.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    shape: tuple[int, int]
    blocksize: int
    quant_type: str
    quant_dtype: torch.dtype
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None
    nested_blocksize: int = 256

    tag: ClassVar[str] = "4bit"

    def __post_init__(self) -> None:
        if self.quant_type not in ("nf4", "fp4"):
            raise QuantizationError(f"4-bit weights are 'nf4' or 'fp4', not {self.quant_type!r}.")
        if self.blocksize < 2 or self.blocksize % 2:
            raise QuantizationError(f"{self.blocksize} is not a block size of 4-bit weights.")
        size = self.shape[0] * self.shape[1]
        blocks = -(-size // self.blocksize)
        self._check("packed", self.packed, torch.uint8, -(-size // 2))
        self._check("code", self.code, torch.float32, 16)
        if not self.is_nested:
            self._check("absmax", self.absmax, torch.float32, blocks)
            return
        self._check("absmax", self.absmax, torch.uint8, blocks)
        groups = -(-blocks // self.nested_blocksize)
        self._check("nested_absmax", self.nested_absmax, torch.float32, groups)
        self._check("nested_code", self.nested_code, torch.float32, 256)
        self._check("nested_offset", self.nested_offset, torch.float32, 1)

    def _check(self, name: str, tensor: torch.Tensor | None, dtype: torch.dtype, size: int) -> None:
        if tensor is None or tensor.dtype != dtype or tensor.numel() != size:
            found = "nothing" if tensor is None else _describe(tensor)
            raise QuantizationError(
                f"4-bit weights of a {list(self.shape)} matrix in blocks of {self.blocksize} need "
                f"{size} x {dtype} "
                f"as {name}, not {found}."
            )

    @property
    def is_nested(self) -> bool:
        """Whether the scales are quantized too."""
        return self.nested_absmax is not None or self.absmax.dtype == torch.uint8

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.quant_type

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def block_scales(self) -> torch.Tensor:
        """The scale of each block, [blocks] float32: bitsandbytes' own numbers, bit for bit."""
        if self.nested_absmax is None or self.nested_code is None or self.nested_offset is None:
            return self.absmax
        groups = self.nested_absmax.repeat_interleave(self.nested_blocksize)[: self.absmax.numel()]
        return self.nested_code[self.absmax.int()] * groups + self.nested_offset

    def rows(self, index: torch.Tensor) -> FourBitBytes:
        width = self.shape[1]
        values = [(start * width, stop * width) for start, stop in runs_of(index)]
        size = self.shape[0] * width
        # Only the last block of the whole matrix may be a short one, and only at the end of the
        # result.
        whole = all(
            start % self.blocksize == 0
            and (stop % self.blocksize == 0 or (stop == size and i == len(values) - 1))
            for i, (start, stop) in enumerate(values)
        )
        if not whole:
            raise QuantizationError(
                f"a row of {width} values is not a whole number of blocks of {self.blocksize}, so "
                f"these rows share "
                "blocks with others"
            )
        taken = self._with_scales(
            [(start // self.blocksize, -(-stop // self.blocksize)) for start, stop in values]
        )
        halves = [(start // 2, -(-stop // 2)) for start, stop in values]
        return replace(self, packed=take(self.packed, halves), shape=(len(index), width), **taken)

    def _with_scales(self, blocks: list[tuple[int, int]]) -> dict[str, Any]:
        """The fields that hold the scales of some runs of blocks."""
        if self.nested_absmax is None:
            return {"absmax": take(self.absmax, blocks)}
        edges = [n for run in blocks for n in run][:-1]
        for group in _NESTED_BLOCKSIZES:
            if self.nested_blocksize % group == 0 and all(edge % group == 0 for edge in edges):
                per = self.nested_blocksize // group
                finer = (
                    self.nested_absmax if per == 1 else self.nested_absmax.repeat_interleave(per)
                )
                groups = [(start // group, -(-stop // group)) for start, stop in blocks]
                return {
                    "absmax": take(self.absmax, blocks),
                    "nested_absmax": take(finer, groups),
                    "nested_blocksize": group,
                }
        # Rows that start inside a group of scales: keep the scales themselves, which are the same
        # numbers.
        scales = take(self.block_scales(), blocks)
        return {"absmax": scales, "nested_absmax": None, "nested_code": None, "nested_offset": None}


def outline(
    rows: int, columns: int, kind: str, blocksize: int = 64, double_quant: bool = False
) -> QuantizedBytes:
    """The bytes of a matrix [rows, columns] on the meta device: their sizes and nothing else."""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    if kind == "int8":
        return Int8Bytes(empty(rows, columns, dtype=torch.int8), empty(rows))
    size = rows * columns
    blocks = -(-size // blocksize)
    nested: dict[str, Any] = {}
    if double_quant:
        nested = {
            "nested_absmax": empty(-(-blocks // _NESTED_BLOCKSIZES[0])),
            "nested_code": empty(256),
            "nested_offset": empty(),
        }
    return FourBitBytes(
        packed=empty(-(-size // 2), 1, dtype=torch.uint8),
        absmax=empty(blocks, dtype=torch.uint8 if double_quant else torch.float32),
        code=empty(16),
        shape=(rows, columns),
        blocksize=blocksize,
        quant_type=kind,
        quant_dtype=torch.float32,
        **nested,
    )


def full_code(code: torch.Tensor, kind: str) -> torch.Tensor:
    """The table of a 4-bit type as float32: bitsandbytes makes it in the default dtype of the
    process, in which it is kept and saved beside the bytes; the bytes are the same.

    Args:
        code: [16], as it came.
        kind: "nf4" or "fp4".

    Returns:
        The table itself if it is float32, or not that of the type.
    """
    if code.dtype == torch.float32 or not code.is_floating_point() or kind not in _CODES:
        return code
    if code.is_meta:
        return torch.empty(code.shape, dtype=torch.float32, device="meta")
    full = torch.tensor(_CODES[kind], dtype=torch.float32, device="cpu").to(code.device)
    return full if torch.equal(full.to(code.dtype), code.reshape(-1)) else code


@runs_untraced
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


def take(tensor: torch.Tensor, runs: list[tuple[int, int]]) -> torch.Tensor:
    """Runs of the first dimension, one after the other: a view of one run, a copy of several."""
    parts = [tensor[start:stop] for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"
