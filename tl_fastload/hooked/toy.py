"""TransformerLens' own toy models, which are `.pth` files under its own names."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformer_lens import HookedTransformer

from tl_fastload.errors import CheckpointError
from tl_fastload.ground.wrappers import without_wrappers
from tl_fastload.huggingface import config
from tl_fastload.huggingface.pretrained import Pretrained
from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise
from tl_fastload.source.checkpoint import names_at_hand, open_weights

_OWNERS = ("NeelNanda", "ArthurConmy", "Baidicoot")


def is_toy_name(official_name: str | None) -> bool:
    """Whether an official name is one of the `.pth` toy models."""
    return official_name is not None and official_name.startswith(_OWNERS)


def is_toy(official_name: str | None, raw: Mapping[str, Any]) -> bool:
    """Whether a model is a toy model, by its official name and the fields of its `config.json`."""
    return is_toy_name(official_name) or config.is_toy(raw)


def toy_name(pretrained: Pretrained) -> str:
    """A name whose prefix sends TransformerLens to its toy branch; "_old" marks the early SoLU
    format.
    """
    name = pretrained.place().folder.name
    is_dated = "architecture" in (pretrained.raw or {}) or "_old" in name
    return (
        f"NeelNanda/{name}"
        if is_dated or not _has_old_names(pretrained)
        else f"NeelNanda/{name}_old"
    )


def _has_old_names(pretrained: Pretrained) -> bool:
    location = pretrained.place()
    weights = [name for name in names_at_hand(location) if name.endswith("final.pth")]
    if not weights:
        raise CheckpointError(
            f"{location.label} has the configuration of a toy model but no file that ends in "
            "final.pth. Put the weights beside config.json."
        )
    contents = open_weights(location, weights_file=weights[0]).load_tensors()
    return any("norm" in name for name in contents.tensors)


def toy_weights(pretrained: Pretrained, file_name: str) -> dict[str, Promise]:
    """Promises for the tensors of a toy model's file."""
    promises = pretrained.promises_of(pretrained.open(weights_file=file_name))
    renaming = without_wrappers(promises)
    pretrained.notes.extend(renaming.notes)
    return renaming.apply(promises)


def outline_of_toy(pretrained: Pretrained, cfg: Any) -> dict[str, Promise] | None:
    """Promises for a toy model's file that is not at hand and must not be downloaded: its names are
    TransformerLens'. None if there is no such file.
    """
    wanted = f"{cfg.checkpoint_value}.pth" if cfg.from_checkpoint else "final.pth"
    found = [name for name in pretrained.file_names() if name.endswith(wanted)]
    if not found or not pretrained.open(weights_file=found[0]).is_outline:
        return None
    with torch.device("meta"):
        model = HookedTransformer(copy.deepcopy(cfg), move_to_device=False)
    return {
        name: Promise.of(MemorySource(tensor.detach(), name))
        for name, tensor in model.named_parameters()
    }
