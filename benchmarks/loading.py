"""What transformers needs to know of a dtype, whatever its version."""

from __future__ import annotations

import torch

from tl_fastload.cli.bench.loads import torch_dtype
from tl_fastload.ground import compat


def dtype_argument(name: str) -> dict[str, torch.dtype]:
    """The argument of `from_pretrained` that sets the dtype."""
    return {compat.CONFIG_DTYPE_NAME: torch_dtype(name)}
