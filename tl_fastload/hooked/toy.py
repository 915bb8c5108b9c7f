"""TransformerLens' own toy models, which are `.pth` files under its own names."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformer_lens import HookedTransformer

from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise


def outline_of_toy(cfg: Any) -> dict[str, Promise]:
    """Promises for a toy model's file that is not looked into: its names are TransformerLens'."""
    with torch.device("meta"):
        model = HookedTransformer(copy.deepcopy(cfg), move_to_device=False)
    return {
        name: Promise.of(MemorySource(tensor.detach(), name))
        for name, tensor in model.named_parameters()
    }
