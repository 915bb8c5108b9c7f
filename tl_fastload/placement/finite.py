"""Finds parameters with NaN or infinite values, in one pass over each."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tl_fastload.ground import compat
from tl_fastload.ground.cores import Cores
from tl_fastload.ground.geometry import is_dense
from tl_fastload.quantized import QuantizedTensor

_ASYNCHRONOUS = ("cuda",)  # devices that compute while the thread goes on


class FiniteSearch:
    """Looks at parameters while they are placed.

    Args:
        cores: shared with those that work ahead.
    """

    def __init__(self, cores: Cores) -> None:
        self._cores = cores
        self._found: list[str] = []
        self._sums: dict[str, torch.Tensor] = {}

    def look(self, name: str, tensor: torch.Tensor) -> None:
        """Look at the values of one parameter; on a CUDA device only begin to: waiting for each
        would leave its bus idle.
        """
        if tensor.device.type in _ASYNCHRONOUS and tensor.is_floating_point():
            self._sums[name] = tensor.sum(dtype=torch.float32)
            return
        with self._cores.beside_helpers():
            if not _is_finite(tensor):
                self._found.append(name)

    def not_finite(self, placed: Callable[[str], torch.Tensor]) -> list[str]:
        """The parameters that have such values.

        Args:
            placed: gives a parameter, which is looked at again where its sum may have overflowed.
        """
        for name, total in self._sums.items():
            if not torch.isfinite(total):
                tensor = placed(name)
                if isinstance(tensor, QuantizedTensor) or not torch.isfinite(tensor).all():
                    self._found.append(name)
        self._sums.clear()
        return self._found


def _is_finite(tensor: torch.Tensor) -> bool:
    # One pass over the memory, without a temporary: a sum is finite unless an element is not (or
    # it overflows).
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    flat = tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor
    if tensor.numel() and tensor.dtype == torch.float16:  # where sums overflow easily
        return compat.halves_are_finite(flat)
    return bool(torch.isfinite(flat.sum())) or bool(torch.isfinite(tensor).all())
