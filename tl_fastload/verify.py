"""Checks of what fits together: arguments, state dicts, recipes. Everything wrong is told in one error."""

from __future__ import annotations

import re
from typing import Any

import torch

from tl_fastload.errors import ArgumentError, MissingWeightsError
from tl_fastload.evaluator import sources
from tl_fastload.origin import Origin
from tl_fastload.promise import Promise
from tl_fastload.tree import MissingSource

_LAYER = re.compile(r"\.(?:h|layers|blocks)\.(\d+)\.")
# Parts of multimodal checkpoints that the text model does not have.
_NOT_TEXT = re.compile(r"(vision_tower|vision_model|multi_modal_projector|audio_tower)")


def check_arguments(arguments: dict[str, Any], keywords: dict[str, Any]) -> None:
    """Raise ArgumentError for arguments that contradict each other."""
    checkpoint = [n for n in ("checkpoint_index", "checkpoint_value", "checkpoint_label") if arguments[n] is not None]
    if arguments["checkpoint_value"] is not None and arguments["checkpoint_label"] is not None:
        raise ArgumentError("checkpoint_value and checkpoint_label are two names of one thing: pass one.")
    if checkpoint and arguments["hf_model"] is not None:
        raise ArgumentError(f"{checkpoint[0]}= picks a checkpoint on the hub, but hf_model= already has weights.")
    if checkpoint and keywords.get("revision") is not None:
        raise ArgumentError(f"{checkpoint[0]}= and revision= both name a version of the weights: pass one.")
    first = arguments["first_n_layers"]
    if first is not None and (not isinstance(first, int) or first < 0):
        raise ArgumentError(f"first_n_layers={first!r} is not a number of layers.")
    if arguments["n_ctx"] is not None and arguments["n_ctx"] < 1:
        raise ArgumentError(f"n_ctx={arguments['n_ctx']!r} is not a context length.")


def check_state_dict(model: Any, state_dict: dict[str, Any]) -> None:
    """Raise MissingWeightsError if tensors of a state dict have other shapes than the model's."""
    own = model.state_dict(keep_vars=True)
    wrong = [
        f"{name}: {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in state_dict.items()
        if isinstance(value, torch.Tensor) and name in own and not _fits(value, own[name])
    ]
    if wrong:
        raise MissingWeightsError(
            "The state dict has tensors of the wrong shape; the model is unchanged:\n  " + "\n  ".join(wrong)
        )


def check_recipes(model: Any, origin: Origin, recipes: dict[str, Promise]) -> None:
    """Raise MissingWeightsError for everything of the checkpoint that does not fit the model."""
    read = [view.source for promise in recipes.values() for view in sources(promise.node)]
    missing = sorted({source.name for source in read if isinstance(source, MissingSource)})
    problems = [f"missing: {name}" for name in missing]
    problems += [f"unexpected: {name}" for name in sorted(origin.ledger.unexpected) if not _NOT_TEXT.search(name)]
    for name, (found, wanted) in sorted(origin.ledger.misshapen.items()):
        problems.append(f"misshapen: {name} is {found}, the configuration asks for {wanted}")
    own = dict(model.named_parameters())
    for name, promise in recipes.items():
        if name in own and not _fits(promise, own[name]):
            problems.append(f"misshapen: {name} comes out as {tuple(promise.shape)} instead of {tuple(own[name].shape)}")
    names = {id(source) for source in read}
    problems += [f"not used: {name}" for name in _unread(origin, names, model.cfg.n_layers)]
    if problems:
        raise MissingWeightsError(
            f"{origin.label} does not fit the model that its configuration describes:\n  "
            + "\n  ".join(problems)
            + "\nNothing was loaded. Check that the checkpoint is complete and belongs to this config.json; to load it as "
            "transformers does, pass hf_model=AutoModelForCausalLM.from_pretrained(...)."
        )


def _fits(tensor: torch.Tensor, parameter: torch.Tensor) -> bool:
    return tensor.shape == parameter.shape or (tensor.numel() == 1 and parameter.dim() == 0)


def _unread(origin: Origin, read: set[int], n_layers: int) -> list[str]:
    """Weights of the checkpoint that no parameter of the model depends on."""
    if origin.root is None or not hasattr(origin.root, "named_parameters"):
        return []
    unread = []
    for name, promise in origin.root.named_parameters():
        layer = _LAYER.search("." + name)
        beyond = layer is not None and int(layer.group(1)) >= n_layers
        if beyond or _NOT_TEXT.search(name) or not isinstance(promise, Promise):
            continue
        found = [view.source for view in sources(promise.node)]
        if not any(id(s) in read or isinstance(s, MissingSource) for s in found):
            unread.append(name)
    return unread
