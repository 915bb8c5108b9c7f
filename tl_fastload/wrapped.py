"""The model behind what torch wraps around it."""

from __future__ import annotations

from typing import Any

from torch import nn

# Where each wrapper keeps what it wraps; torch.compile's class is told by its attribute, as
# importing torch._dynamo is slow.
_COMPILED = "_orig_mod"
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)

WRAPPER_PARTS = (_COMPILED, "module")
"""What these wrappers put into the names of a state dict."""


def unwrapped(model: Any) -> Any:
    """The original of a model that is compiled (`torch.compile`) or parallel (`DataParallel`,
    `DistributedDataParallel`), one in the other in any order; any other object as it is.
    """
    while isinstance(model, nn.Module):
        if _COMPILED in model._modules:
            model = model._modules[_COMPILED]
        elif isinstance(model, _PARALLEL):
            model = model.module
        else:
            break
    return model
