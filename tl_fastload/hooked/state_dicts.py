"""State dicts in TransformerLens' naming: what they may lack, and what stands for it."""

from __future__ import annotations

from typing import Any

import torch

from tl_fastload.errors import MissingWeightsError
from tl_fastload.ground.words import listed
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
    lost = [name for name in missing if is_weight_matrix(name)]
    if model.cfg.positional_embedding_type == "alibi" and "pos_embed.W_pos" in lost:
        # ALiBi models have no position embedding; TransformerLens never reads this parameter.
        lost.remove("pos_embed.W_pos")
        if not own["pos_embed.W_pos"].is_meta:  # a live model is not written to yet
            own["pos_embed.W_pos"] = torch.zeros_like(own["pos_embed.W_pos"])
    if lost:
        raise MissingWeightsError(
            f"The weights lack {listed(lost)}. Nothing was loaded. Check that the checkpoint is "
            "complete and of this architecture."
        )
    defaults = {name: as_promise(own[name], name) for name in missing}
    return {**state_dict, **defaults}


def is_norm(name: str) -> bool:
    """Whether a parameter is a weight or bias of one of the norms that `fold_ln` folds."""
    return name.endswith(("ln1.w", "ln1.b", "ln2.w", "ln2.b", "ln_final.w", "ln_final.b"))


def is_weight_matrix(name: str) -> bool:
    """Whether a parameter is one that no default can stand for, by its name."""
    # A leaf such as W_Q or _W_K, or the weight of an expert's linear layer such as W_in.weight.
    return any(part.lstrip("_").startswith("W_") for part in name.split(".")[-2:]) and not (
        name.endswith(".bias")
    )
