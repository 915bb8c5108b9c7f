"""How large a tensor is."""

from __future__ import annotations

import torch


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements, wherever they are and whatever lies between them."""
    return tensor.numel() * tensor.element_size()
