"""Which parameters become quantized tensors: those whose bytes come quantized, or all projections.

Whatever matrix stays dense is noted with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from tl_fastload.errors import QuantizationError
from tl_fastload.ground.role import Role, RoleOf
from tl_fastload.quantized import views
from tl_fastload.quantized.recipes import follow, reads_quantized
from tl_fastload.quantized.spec import Spec
from tl_fastload.quantized.tensor import QuantizedTensor, quantize
from tl_fastload.recipes.evaluate import evaluate, sources
from tl_fastload.recipes.promise import Promise


@dataclass
class Quantizer:
    """Makes quantized tensors for one load.

    Args:
        spec: how to quantize dense weights, or None to keep those that come dense.
        role: what each parameter of the model is.
        shifts: what processing took out of the input of each matrix.

    Attributes:
        not_quantized: parameter name -> why it is dense.
    """

    spec: Spec | None
    role: RoleOf
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
        if self.stays_dense(name, promise) or not reads_quantized(promise.node):
            return None
        try:
            tensor = follow(promise.node, device)
            if name in self.shifts and tensor.content.stored.rounds_activations:
                if device.type != "cpu":  # which dequantizes a matrix in less time than the host
                    tensor = tensor.compact().to(device)  # type: ignore[assignment]
                tensor = tensor.shift_input(evaluate(self.shifts[name].node, device).tensor)
            tensor = tensor.compact()
        except QuantizationError as error:
            self._note(name, str(error))
            return None
        placed: QuantizedTensor = tensor.to(device=device, dtype=dtype)  # type: ignore[assignment]
        return placed

    def stays_dense(self, name: str, promise: Promise) -> bool:
        """Whether a parameter is placed as its recipe says, and may be mapped; notes why."""
        role = self.role(name)
        # Biases of heads have two dimensions, too.
        if promise.dim() < 2 or not promise.is_floating_point() or role.kind != "matrix":
            return True
        if reads_quantized(promise.node):
            return False
        reason: str | None = "not quantized in the checkpoint"
        if self.spec is not None:
            reason = _why_dense(name, role, promise, self.spec)
        if reason is not None:
            self._note(name, reason)
        return reason is not None

    def quantize(self, name: str, tensor: torch.Tensor) -> QuantizedTensor | None:
        """A dense parameter, which `keep` has seen, quantized as asked for; None if it stays
        dense.
        """
        role = self.role(name)
        if self.spec is None or not role.is_projection or name in self.not_quantized:
            return None
        order = role.order
        matrix = tensor.permute(order)
        rows = matrix.reshape(matrix.shape[: role.n_outputs].numel(), -1).contiguous()
        made = quantize(rows, self.spec)
        whole = views.whole(made.content.stored.shape).view(matrix.shape)
        back = [order.index(dim) for dim in range(len(order))]
        return QuantizedTensor(made.content, whole.permute(back), tensor.dtype)

    def _note(self, name: str, reason: str) -> None:
        role = self.role(name)
        self.not_quantized[name] = reason if role.is_projection else f"{role.what}: {reason}"


def _why_dense(name: str, role: Role, promise: Promise, spec: Spec) -> str | None:
    """Why a matrix is not quantized; None if it is."""
    if not role.is_projection:
        return "not a projection"
    # Configurations name modules as transformers does, or as TransformerLens does.
    read = [v.source for v in sources(promise.node) if v.source.shape.numel() >= promise.numel()]
    names = [name, *(getattr(source, "name", "") for source in read)]
    if any(f".{part}." in f".{one}." for part in spec.skip for one in names):
        return "skipped, as the configuration asks"
    row = torch.Size(promise.shape[dim] for dim in role.order[role.n_outputs :])
    return spec.why_dense(row.numel())
