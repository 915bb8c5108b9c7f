"""Which parameters become quantized tensors: those whose bytes come quantized, or all projections.

Whatever matrix stays dense is noted with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from tl_fastload import quantized, quantized_view
from tl_fastload.errors import QuantizationError
from tl_fastload.evaluator import evaluate
from tl_fastload.promise import Promise
from tl_fastload.quantization import Quantization
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.quantized_recipes import follow, reads_quantized

# Parameter name -> the memory order of its dimensions as the matrix [out, in], and how many of them
# are outputs.
_AS_MATRIX = {
    **dict.fromkeys(("W_Q", "W_K", "W_V", "_W_K", "_W_V"), ((0, 2, 1), 2)),
    "W_O": ((2, 0, 1), 1),
    **dict.fromkeys(("W_in", "W_gate", "W_out"), ((1, 0), 1)),
}
_EXPERT = ((0, 1), 1)
_ROLES = {
    "embed.W_E": "embedding",
    "pos_embed.W_pos": "position embedding",
    "unembed.W_U": "unembedding",
}


@dataclass
class Quantizer:
    """Makes quantized tensors for one load.

    Args:
        spec: how to quantize dense weights, or None to keep those that come dense.
        shifts: what processing took out of the input of each matrix
            (`tl_fastload.quantized_shifts`).

    Attributes:
        not_quantized: parameter name -> why it is dense.
    """

    spec: Quantization | None
    shifts: Mapping[str, Promise] = field(default_factory=dict)
    not_quantized: dict[str, str] = field(default_factory=dict)

    def keep(
        self, name: str, promise: Promise, dtype: torch.dtype, device: torch.device
    ) -> QuantizedTensor | None:
        """The parameter on the bytes that it comes from, or None if it has to be dense.

        Args:
            name: of the parameter.
            promise: its recipe.
            dtype: what it computes in.
            device: where its bytes go.
        """
        if promise.dim() < 2 or not promise.is_floating_point() or not _is_matrix(name):
            return None
        if not reads_quantized(promise.node):
            if self.spec is None:
                self._note(name, "not quantized in the checkpoint")
            return None
        try:
            tensor = follow(promise.node, device)
            if name in self.shifts and tensor.content.stored.kind == "int8":
                # Rounding activations is what 8-bit kernels do; the others do not.
                tensor = tensor.shift_input(evaluate(self.shifts[name].node, device).tensor)
            tensor = tensor.compact()
        except QuantizationError as error:
            self._note(name, str(error))
            return None
        placed: QuantizedTensor = tensor.to(device=device, dtype=dtype)  # type: ignore[assignment]
        return placed

    def quantize(self, name: str, tensor: torch.Tensor) -> QuantizedTensor | None:
        """A dense parameter quantized as asked for, or None if it is to stay dense."""
        if self.spec is None or tensor.dim() < 2 or not _is_matrix(name):
            return None
        order, outputs = self._as_matrix(name)
        if outputs == 0:
            return None
        matrix = tensor.permute(order)
        out = matrix.shape[:outputs].numel()
        dense = matrix.reshape(out, -1)
        if self.spec.kind != "int8" and dense.shape[1] % self.spec.blocksize:
            self._note(
                name,
                f"a row of {dense.shape[1]} is not a whole number of blocks of "
                f"{self.spec.blocksize}",
            )
            return None
        made = quantized.quantize(
            dense.contiguous(),
            self.spec.kind,
            blocksize=self.spec.blocksize,
            double_quant=self.spec.double_quant,
            threshold=self.spec.threshold,
            dtype=tensor.dtype,
            compute_dtype=self.spec.compute_dtype,
        )
        whole = quantized_view.whole(made.content.stored.shape).view(matrix.shape)
        back = [order.index(dim) for dim in range(len(order))]
        return QuantizedTensor(made.content, whole.permute(back), tensor.dtype)

    def _as_matrix(self, name: str) -> tuple[tuple[int, ...], int]:
        if self.spec is not None and any(f".{part}." in f".{name}." for part in self.spec.skip):
            self._note(name, "skipped, as the configuration asks")
            return (), 0
        leaf = name.rsplit(".", 1)[-1]
        if ".experts." in name and leaf == "weight":
            return _EXPERT
        if leaf not in _AS_MATRIX:
            self._note(name, "not a projection")
        return _AS_MATRIX.get(leaf, ((), 0))

    def _note(self, name: str, reason: str) -> None:
        role = _ROLES.get(name, "router" if name.endswith(".mlp.W_gate.weight") else "")
        self.not_quantized[name] = f"{role}: {reason}" if role else reason


def _is_matrix(name: str) -> bool:
    """Whether a parameter is a weight matrix by its name; per-head biases have two dimensions
    too.
    """
    return name.rsplit(".", 1)[-1].lstrip("_").startswith(("W_", "weight"))
