"""State dicts in TransformerLens' naming: what they may lack, and what stands for it."""

from __future__ import annotations

from typing import Any

import torch

from tl_fastload.errors import MissingWeightsError
from tl_fastload.ground.words import listed
from tl_fastload.hooked.names import is_unread, role
from tl_fastload.placement.own_values import as_promise


def fill_missing_keys(model: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Complete a state dict with what the model has by default: zero biases, unit norms, its
    buffers.

    Raises:
        MissingWeightsError: a weight matrix is missing; TransformerLens would go on with
            uninitialised memory.
    """
    own = model.state_dict(keep_vars=True)
    missing = [name for name in own if name not in state_dict]
    lost = [name for name in missing if role(name).kind == "matrix"]
    for name in [name for name in lost if is_unread(name, model.cfg)]:
        lost.remove(name)
        if not own[name].is_meta:  # a live model is not written to yet
            own[name] = torch.zeros_like(own[name])
    if lost:
        raise MissingWeightsError(
            f"The weights lack {listed(lost)}. Nothing was loaded. Check that the checkpoint is "
            "complete and of this architecture."
        )
    defaults = {name: as_promise(own[name], name) for name in missing}
    return {**state_dict, **defaults}
