"""Quantized bytes and what is kept beside them: products, and exact weight processing.

TransformerLens' weight processing never touches the bytes. With Q the quantized matrix [out, in],
s a scale per input, and C = I - 11'/n the projection that removes a mean, the matrix stands for
`W = C_out Q diag(s) C_in`:

- `fold_layer_norm` multiplies the columns by ln.w first, and then removes from the product its mean
  over d_model, the input side: `W - mean_in(W) = (Q diag(s)) C_in`.
- `center_writing_weights` removes the mean over d_model where it is the output side: `C_out Q`.

C is symmetric, so `x W' = C_out(Q (s * C_in(x)))`: an activation is centred first, scaled next,
multiplied by the bytes, and centred again at the end. Scaling what is centred already, as in
`Q C_in diag(s)`, has no such form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from tl_fastload.errors import QuantizationError
from tl_fastload.quantized import formats
from tl_fastload.quantized.formats.base import Declared, QuantizedBytes

_BESIDE = ("in_scale", "in_shift", "out_shift")


@dataclass(frozen=True, eq=False)
class Content(Declared):
    """What a quantized tensor holds: everything but the view.

    Attributes:
        stored: the bytes.
        compute_dtype: what a kernel with a choice multiplies in; None for the activations' dtype.
        in_scale: [in] float32, multiplies the columns; None for ones.
        center_in: whether the mean over the input is removed, after scaling.
        center_out: whether the mean over the output is removed.
        in_shift: [in] float32, added to what reaches the kernel; the map stays what it was.
        out_shift: [out] float32, what the kernel makes of `in_shift`; taken off its result.
    """

    stored: QuantizedBytes
    compute_dtype: torch.dtype | None = None
    in_scale: torch.Tensor | None = None
    center_in: bool = False
    center_out: bool = False
    in_shift: torch.Tensor | None = None
    out_shift: torch.Tensor | None = None

    @property
    def is_processed(self) -> bool:
        return self.in_scale is not None or self.center_in or self.center_out

    def parts(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Its tensors, and all the rest as plain values: what is saved."""
        plain = {k: v for k, v in self.plain().items() if k not in _BESIDE}
        stored = {k: v for k, v in self.stored.plain().items() if v is not None}
        return self.tensors(), {"stored": (self.stored.tag, stored), **plain}

    @classmethod
    def build(cls, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> Content:
        """The inverse of `parts`."""
        own = dict(plain)
        tag, options = own.pop("stored")
        beside: dict[str, Any] = {name: tensors.get(name) for name in _BESIDE}
        inner = {name: tensor for name, tensor in tensors.items() if name not in _BESIDE}
        # JSON has no tuples.
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        return cls(formats.bytes_class(tag)(**options, **inner), **beside, **own)

    def rows(self, index: torch.Tensor | range) -> Content:
        """Some rows of the matrix.

        Raises:
            QuantizationError: they cannot be taken out without quantizing again.
        """
        if self.center_out and len(index) != self.stored.shape[0]:
            raise QuantizationError("the matrix is centred over rows that this part does not have")
        stored = self.stored.run(index) if isinstance(index, range) else self.stored.rows(index)
        out_shift = self.out_shift
        if out_shift is not None:
            out_shift = out_shift[torch.as_tensor(index, device=out_shift.device)]
        return replace(self, stored=stored, out_shift=out_shift)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x @ W.T + bias` as the bytes multiply, for x [..., in]; in x's dtype."""
        if self.center_in or self.in_scale is not None or self.in_shift is not None:
            x = self._prepared(x)
        if not self.center_out and self.out_shift is None:
            return self.stored.linear(x, bias, self.compute_dtype)
        out = self.stored.linear(x, None, self.compute_dtype)
        wide = out.to(torch.promote_types(x.dtype, torch.float32))
        if self.out_shift is not None:
            wide = wide - self.out_shift
        if self.center_out:
            wide = wide - wide.mean(-1, keepdim=True)
        return (wide if bias is None else wide + bias).to(x.dtype)

    def _prepared(self, x: torch.Tensor) -> torch.Tensor:
        """The activation that the bytes are multiplied by."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.center_in:
            wide = wide - wide.mean(-1, keepdim=True)
        if self.in_scale is not None:
            wide = wide * self.in_scale
        if self.in_shift is not None:
            wide = wide + self.in_shift
        return wide.to(x.dtype)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [out, in] that `linear` multiplies by."""
        if not self.is_processed:
            return self.stored.dense(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values = self.stored.dense(wide)
        if self.in_scale is not None:
            values *= self.in_scale
        if self.center_in:
            values -= values.mean(1, keepdim=True)
        if self.center_out:
            values -= values.mean(0, keepdim=True)
        return values.to(dtype)
