"""Unsigned integers of 2, 4 or 8 bits in words of 32, with a scale and a zero point for each group
of a row's values: how GPTQ, AWQ and compressed-tensors pack matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from tl_fastload.errors import QuantizationError
from tl_fastload.quantized.formats.base import damaged, describe, join_rows, runs_of, take_rows
from tl_fastload.quantized.formats.decoded import DecodedBytes
from tl_fastload.quantized.formats.scaled_bytes import (
    grid_of,
    looked_up,
    over_blocks,
    pairs_of,
)
from tl_fastload.quantized.views import untraced

BITS = (2, 4, 8)
"""Sizes of codes that fill words without a rest."""
SCALES = (torch.float16, torch.bfloat16, torch.float32)
_WORD = 32
_pairs = partial(pairs_of, range(16))
# Numbers of AWQ's columns in a word of eight, from the lowest bits on, and the other way round.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, eq=False)
class PackedBytes(DecodedBytes):
    """The matrix is `(codes - zero points) * scales`; the product is one of float32, and rounded to
    the computing dtype once.

    Attributes:
        packed: [out, words] int32, the codes of a row from the lowest bits on. No strides are
            wanted: GPTQ's words lie transposed.
        scales: [out, groups], floating point.
        shape: (out, in).
        bits: of a code.
        group_size: columns of a group; the last one may be smaller.
        kind: of the checkpoint's spec.
        zeros: [words, groups] int32, the zero points of a group packed along the rows, or
            [out, groups] uint8; None for the middle of the codes.
        zero_shift: what is added to stored zero points.
        groups: [in] int32, the group of each column; None where groups lie side by side.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, int]
    bits: int
    group_size: int
    kind: str
    zeros: torch.Tensor | None = None
    zero_shift: int = 0
    groups: torch.Tensor | None = None

    tag: ClassVar[str] = "packed"

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if self.bits not in BITS:
            raise QuantizationError(
                f"codes have {' or '.join(map(str, BITS))} bits, not {self.bits}."
            )
        grid, words = grid_of(self.shape, (1, self.group_size)), (torch.int32,)
        of_zeros = (words, (words_of(rows, self.bits), grid[1]))
        if self.zeros is not None and self.zeros.dtype == torch.uint8:
            of_zeros = ((torch.uint8,), grid)
        for name, part, dtypes, shape in (
            ("packed codes", self.packed, words, self._words_shape()),
            ("groups of columns", self.groups, words, (columns,)),
            ("scales", self.scales, SCALES, grid),
            ("zero points", self.zeros, *of_zeros),
        ):
            if part is not None and (part.dtype not in dtypes or tuple(part.shape) != shape):
                named = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise QuantizationError(
                    f"a matrix {list(self.shape)} of {self.bits}-bit codes in groups of "
                    f"{self.group_size} needs {list(shape)} {named} as {name}, not "
                    f"{describe(part)}. Bits and group size are those of quantization_config in "
                    "config.json."
                )

    def _words_shape(self) -> tuple[int, int]:
        return (self.shape[0], words_of(self.shape[1], self.bits))

    def rows(self, index: torch.Tensor) -> PackedBytes:
        return replace(self, packed=take_rows(self.packed, index), **self._beside_rows(index))

    def _beside_rows(self, index: torch.Tensor) -> dict[str, Any]:
        """The fields that some rows have, but for their codes."""
        scales, zeros, words = take_rows(self.scales, index), self.zeros, None
        if zeros is not None and zeros.dtype == torch.int32:
            words = _words_of_rows(index, _WORD // self.bits)
        zeros = self.zeros_apart() if words is None else zeros
        zeros = None if zeros is None else take_rows(zeros, index if words is None else words)
        return {"scales": scales, "zeros": zeros, "shape": (len(index), self.shape[1])}

    @classmethod
    def joined(cls, parts: Sequence[PackedBytes]) -> PackedBytes:
        rows = sum(part.shape[0] for part in parts)
        apart = [replace(part, zeros=part.zeros_apart()) for part in parts]
        return join_rows(apart, ("packed", "scales", "zeros"), shape=(rows, parts[0].shape[1]))

    @property
    def row_step(self) -> int:
        return _WORD  # whichever way words lie, a row begins with one

    @property
    def lies_transposed(self) -> bool:
        return self.packed.stride(0) == 1 != self.packed.stride(1)

    def decode(self, first: int, last: int, out: torch.Tensor) -> None:
        self._write_codes(first, last, out)
        zeros = self.zeros_apart(first, last)
        if zeros is None:
            out.sub_(1 << (self.bits - 1))
        else:
            self._over_groups(torch.Tensor.sub_, out, zeros.float().add_(self.zero_shift))
        self._over_groups(torch.Tensor.mul_, out, self.scales[first:last].float())

    def _write_codes(self, first: int, last: int, out: torch.Tensor) -> None:
        """Some rows of the codes as they are, into `out`."""
        words, columns = self.packed[first:last], out.shape[1]
        if self.lies_transposed:
            per = _WORD // self.bits
            write_codes(words.t(), self.bits, [out.t()[place::per] for place in range(per)])
        elif self.bits == 4 and columns % 2 == 0:
            halves = bytes_in(words).flatten(1)[:, : columns // 2]
            looked_up(_pairs, halves, out.view(torch.int64))
        else:
            out.copy_(unpacked(words, self.bits)[:, :columns])

    def zeros_apart(self, first: int = 0, last: int | None = None) -> torch.Tensor | None:
        """The zero points of some rows as they are stored, but not packed: [rows, groups] uint8;
        None for the middle of the codes. Packed ones begin with a word.
        """
        last = self.shape[0] if last is None else last
        if self.zeros is None or self.zeros.dtype == torch.uint8:
            return None if self.zeros is None else self.zeros[first:last]
        per = _WORD // self.bits
        words = self.zeros[first // per : -(-last // per)]
        return self._in_order(unpacked(words.t(), self.bits)).t()[: last - first]

    def _in_order(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [.., n] as they lie in words -> in the order of what they belong to."""
        return codes

    def _over_groups(self, apply: Any, values: torch.Tensor, grid: torch.Tensor) -> None:
        """Change values [rows, in] in place by one number [rows, groups] for each group."""
        dim, block = 1, (1, self.group_size)
        if self.lies_transposed:
            values, grid, dim, block = values.t(), grid.t(), 0, (self.group_size, 1)
        if self.groups is None:
            over_blocks(apply, values, grid, block)
        else:
            apply(values, grid.index_select(dim, self.groups))


@dataclass(frozen=True, eq=False)
class AwqBytes(PackedBytes):
    """Words that hold a value each of eight successive rows, in AWQ's order.

    Attributes:
        packed: [out / 8, in] int32.
    """

    tag: ClassVar[str] = "awq"

    def _words_shape(self) -> tuple[int, int]:
        return (words_of(self.shape[0], self.bits), self.shape[1])

    def rows(self, index: torch.Tensor) -> PackedBytes:
        beside, words = self._beside_rows(index), _words_of_rows(index, 8)
        if words is not None:
            return replace(self, packed=take_rows(self.packed, words), **beside)
        # Out of words that hold other rows, too: the same codes, packed along the rows.
        others = {name: getattr(self, name) for name in ("bits", "group_size", "kind")}
        codes = F.pad(self._codes_of(index), (0, -self.shape[1] % 8))
        packed = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int32)
        return PackedBytes(packed, **others, **beside)

    def _codes_of(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows of the codes, whichever: [n, in] uint8."""
        numbers, shifts = _places_in_words(index)
        words, shifts = self.packed[numbers.to(self.device)], shifts.to(self.device)
        return (words >> shifts[:, None]).bitwise_and_(15).to(torch.uint8)

    @property
    def lies_transposed(self) -> bool:
        return False

    def _write_codes(self, first: int, last: int, out: torch.Tensor) -> None:
        words = self.packed[first // 8 : -(-last // 8)].contiguous()
        write_codes(words, self.bits, [out[row::8] for row in _AWQ_ORDER])

    def _in_order(self, codes: torch.Tensor) -> torch.Tensor:
        places = [codes[..., place::8] for place in _AWQ_PLACES]
        return torch.stack(places, -1).flatten(-2)


def write_codes(words: torch.Tensor, bits: int, outs: Iterable[torch.Tensor]) -> None:
    """Write the codes in words as numbers.

    Args:
        words: [n, m] int32.
        bits: of a code.
        outs: where the lowest code of each word goes, [n, m] or the first rows of that; the next
            ones.
    """
    for place, out in enumerate(outs):
        out.copy_((words[: len(out)] >> (place * bits)).bitwise_and_((1 << bits) - 1))


def any_words(*shape: int) -> torch.Tensor:
    """Words with all kinds of codes, int32."""
    generator = torch.Generator().manual_seed(0)
    low, high = -(1 << 31), (1 << 31) - 1
    words = torch.randint(low, high, shape, generator=generator, device="cpu")
    return words.to(torch.int32)


def needed(pieces: Mapping[str, torch.Tensor], names: Iterable[str]) -> list[torch.Tensor]:
    """The matrices among the pieces of a weight that have these names.

    Raises:
        QuantizationError: some are missing, or none, or there is an ordinary weight, too.
    """
    missing = [name for name in names if name not in pieces]
    if missing:
        raise damaged(f"packed weights without {' and '.join(missing)}")
    if "weight" in pieces:
        raise damaged(
            f"an ordinary weight {describe(pieces['weight'])} beside {' and '.join(names)}: one of "
            "them is left over"
        )
    for name in names:
        if pieces[name].dim() != 2:
            raise QuantizationError(f"{name} is a matrix, not {describe(pieces[name])}.")
    return [pieces[name] for name in names]


def column_groups(
    index: torch.Tensor | None, count: int, size: int, is_reordered: bool, said: Sequence[str]
) -> torch.Tensor | None:
    """The group of each column, [in] int32; None where groups lie side by side.

    Args:
        index: as it is stored; None if it is not.
        count: how many groups have scales.
        size: of a group.
        is_reordered: whether the configuration says that groups do not lie side by side.
        said: the name of the stored piece; the setting; what it says of groups that lie side by
            side; and of others.

    Raises:
        QuantizationError: they are missing; no row of whole numbers; or, where values are known,
            others than groups, or in another order than the configuration says.
    """
    name, setting, side_by_side, otherwise = said
    if index is None:
        if is_reordered:
            raise damaged(
                f"weights without their {name}, which says to which group each column belongs "
                f"({setting} in quantization_config)"
            )
        return None
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise QuantizationError(
            f"the groups of columns (g_idx) are a row of whole numbers, not {describe(index)}."
        )
    if not index.is_meta and len(index) and (int(index.min()) < 0 or int(index.max()) >= count):
        raise damaged(
            f"columns are of groups {int(index.min())} to {int(index.max())} (g_idx), and there "
            f"are scales of {count} groups"
        )
    if is_reordered:
        return index.to(torch.int32)
    if not index.is_meta and bool(
        (index != torch.arange(len(index), device=index.device) // size).any()
    ):
        raise QuantizationError(
            f"the columns' groups (g_idx) are not {size} columns each, one after the other, but "
            f"quantization_config says {side_by_side}. If these are the checkpoint's own, make it "
            f"{otherwise} in config.json."
        )
    return None


def words_of(count: int, bits: int) -> int:
    """How many words some codes fill."""
    return -(-count * bits // _WORD)


def bytes_in(words: torch.Tensor) -> torch.Tensor:
    """The bytes of words [n, w] int32, lowest first: [n, w, 4] uint8."""
    # Flat, as strides of dimensions of size 1 may be anything.
    return words.contiguous().flatten().view(torch.uint8).view(*words.shape, 4)


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes in rows of words [n, w] int32, from the lowest bits on: [n, 32 w / bits] uint8."""
    codes = bytes_in(words).flatten(1)
    if bits == 8:
        return codes
    count = 8 // bits
    parts = torch.empty((*codes.shape, count), dtype=torch.uint8, device=codes.device)
    for place in range(count):
        torch.bitwise_right_shift(codes, place * bits, out=parts[..., place])
    return parts.bitwise_and_((1 << bits) - 1).flatten(1)


@untraced()
def _words_of_rows(index: torch.Tensor, per: int) -> torch.Tensor | None:
    """Numbers of the words that hold some rows, `per` of them in each; None if the rows do not come
    in whole words. The end of the last one may be left out.
    """
    runs = runs_of(index)
    if any(start % per for start, _ in runs) or any(stop % per for _, stop in runs[:-1]):
        return None
    numbers = [torch.arange(start // per, -(-stop // per), device="cpu") for start, stop in runs]
    return torch.cat(numbers)


@untraced()
def _places_in_words(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For AWQ's rows the number of each one's word, and by how many bits it lies in there."""
    shifts = torch.tensor([4 * place for place in _AWQ_PLACES], dtype=torch.int32, device="cpu")
    return index // 8, shifts[index % 8]
