"""What transformers needs to know of a dtype, whatever its version."""

from __future__ import annotations

import torch

from tl_fastload.measure_loads import torch_dtype


def dtype_argument(name: str) -> dict[str, torch.dtype]:
    """The argument of `from_pretrained` that sets the dtype."""
    import transformers
    from packaging.version import Version

    renamed = Version(transformers.__version__) >= Version("4.56")
    return {"dtype" if renamed else "torch_dtype": torch_dtype(name)}
