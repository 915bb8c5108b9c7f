"""Bytes without a kernel: a few rows at a time become numbers, and are multiplied while the
processor's cache holds them. No whole matrix is made, nor kept for the backward pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tl_fastload.quantized.formats.base import QuantizedBytes, join_rows, take_rows

if TYPE_CHECKING:
    from typing_extensions import Self

# Numbers that are decoded at a time on a CPU: more than fit into the second cache, so that
# products are wide.
_PART_SIZE = 1 << 19


class DecodedBytes(QuantizedBytes):
    """Bytes that multiply by their values, which `decode` makes."""

    def rows(self, index: torch.Tensor) -> QuantizedBytes:
        """As the base says, where all tensors have the matrix's rows in their first dimension."""
        return self.map(lambda part: take_rows(part, index))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        return join_rows(parts, parts[0].tensors())

    @property
    def row_step(self) -> int:
        """What `decode` begins at is a multiple of it."""
        return 1

    @property
    def lies_transposed(self) -> bool:
        """Whether `decode` is fastest where the values of an input lie side by side."""
        return False

    @abstractmethod
    def decode(self, first: int, last: int, out: torch.Tensor) -> None:
        """Write the rows from `first` to before `last` into `out`.

        Args:
            first: a multiple of `row_step`.
            last: another, or the end.
            out: [rows, in] float32; contiguous, or transposed so that it is if `lies_transposed`.
        """

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        values = torch.empty(self.shape, dtype=dtype, device=self.device)
        if values.is_meta:
            return values
        if dtype == torch.float32 and not self.lies_transposed:
            for first, last in self._parts():
                self.decode(first, last, values[first:last])
        else:
            for (first, last), part in self._decoded():
                values[first:last].copy_(part)
        return values

    def linear(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        held = next(iter(self.tensors().values()))
        is_traced = type(held) is not torch.Tensor or torch._C._len_torch_dispatch_stack() > 0
        if is_traced or x.is_meta or torch._C._is_any_autocast_enabled():
            return super().linear(x, bias, compute_dtype)
        rows = x.reshape(-1, x.shape[-1])
        out: torch.Tensor = _multiplied(rows, bias, self, False)
        return out.view(*x.shape[:-1], self.shape[0])

    def times(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x @ W.T + bias` for x [n, in], without a gradient: [n, out]."""
        out = torch.empty((len(x), self.shape[0]), dtype=x.dtype, device=x.device)
        if not len(x):
            return out  # an expert that no token goes to
        for (first, last), part in self._decoded():
            columns, here = part.to(x.dtype).t(), out[:, first:last]
            if bias is None:
                torch.mm(x, columns, out=here)
            else:
                torch.addmm(bias[first:last].to(x.dtype), x, columns, out=here)
        return out

    def times_transposed(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ W` for x [n, out], without a gradient: [n, in]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        out = torch.zeros((len(x), self.shape[1]), dtype=wide, device=x.device)
        for (first, last), part in self._decoded():
            out += x[:, first:last] @ part.to(x.dtype)
        return out.to(x.dtype)

    def _decoded(self) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
        """Runs of rows and their values, all in one buffer."""
        parts, columns = list(self._parts()), self.shape[1]
        most = max((last - first for first, last in parts), default=0)
        buffer = torch.empty(most * columns, dtype=torch.float32, device=self.device)
        for first, last in parts:
            count = last - first
            flat = buffer[: count * columns]
            part = flat.view(count, columns)
            if self.lies_transposed:
                part = flat.view(columns, count).t()
            self.decode(first, last, part)
            yield (first, last), part

    def _parts(self) -> Iterator[tuple[int, int]]:
        rows, columns = self.shape
        step = max(rows, 1)
        held = next(iter(self.tensors().values()))
        if type(held) is torch.Tensor and held.device.type == "cpu":
            step = max(_PART_SIZE // max(columns, 1) // self.row_step, 1) * self.row_step
        return ((first, min(first + step, rows)) for first in range(0, rows, step))


class _Product(torch.autograd.Function):
    """`x @ W.T + bias`, or `x @ W` where it is turned: each is the other's gradient. The backward
    pass decodes anew.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: Any, stored: DecodedBytes, turned: bool) -> Any:
        ctx.stored, ctx.turned = stored, turned
        ctx.bias_dtype = None if bias is None else bias.dtype
        return stored.times_transposed(x) if turned else stored.times(x, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _multiplied(grad, None, ctx.stored, not ctx.turned)
        if ctx.needs_input_grad[1]:
            of_bias = grad.sum(0).to(ctx.bias_dtype)
        return of_x, of_bias, None, None


_multiplied: Any = _Product.apply  # torch leaves it without types
