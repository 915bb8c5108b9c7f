"""Norms that TransformerLens 2 replaces by ones without weights, folded or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tl_fastload.ground import compat
from tl_fastload.hooked import steps
from tl_fastload.placement.own_values import as_promise
from tl_fastload.recipes.promise import Promise


def kept_norms(cfg: Any, requested: Mapping[str, bool]) -> list[str]:
    """Let a model have the norm weights that stock would drop without folding them.

    Args:
        cfg: the configuration that the model is built with; changed.
        requested: the processing steps that were asked for.

    Returns:
        What the report has to say about it.
    """
    if not requested["fold_ln"] or not steps.drops_norms(cfg):
        return []
    cfg.normalization_type = cfg.normalization_type.removesuffix("Pre")
    return [
        "fold_ln is skipped and the norms keep their weights: TransformerLens "
        f"{compat.TRANSFORMER_LENS} drops those of a model with experts without folding them, "
        "which makes its numbers wrong. Version 3 folds them."
    ]


def unit_norms(model: Any, promises: dict[str, Promise]) -> dict[str, Promise]:
    """Weights of one and biases of zero for norms that are folded already.

    TransformerLens 2 folds what it finds in the state dict and fails without it.

    Args:
        model: the model; norms that it has need no stand-in.
        promises: the state dict.
    """
    cfg, own = model.cfg, model.state_dict(keep_vars=True)
    blocks = [f"blocks.{layer}" for layer in range(cfg.n_layers)]
    widths = {f"{block}.ln1": cfg.d_model for block in blocks}
    if not cfg.attn_only:
        widths |= {f"{block}.ln2": cfg.d_model for block in blocks}
        if cfg.is_layer_norm_activation():
            widths |= {f"{block}.mlp.ln": cfg.d_mlp for block in blocks}
    widths["ln_final"] = cfg.d_model
    missing: dict[str, Promise] = {}
    for norm, width in widths.items():
        for leaf, value in (("w", 1.0), ("b", 0.0)):
            name = f"{norm}.{leaf}"
            if name not in promises and name not in own:
                filled = torch.full((width,), value, dtype=cfg.dtype, device="cpu")
                missing[name] = as_promise(filled, name)
    return missing
