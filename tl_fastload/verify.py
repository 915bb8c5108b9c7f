"""Checks of what fits together: arguments, state dicts, recipes. All that is wrong is told at
once.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformer_lens.HookedTransformer import DTYPE_FROM_STRING

from tl_fastload import compat
from tl_fastload.bnb_kernels import require_device
from tl_fastload.errors import (
    ArgumentError,
    LeanLoadError,
    MissingWeightsError,
    NotEnoughMemoryError,
)
from tl_fastload.evaluator import sources
from tl_fastload.memory import available_bytes
from tl_fastload.options import Options
from tl_fastload.origin import Origin
from tl_fastload.promise import Promise
from tl_fastload.report import format_bytes
from tl_fastload.tree import Branch, MissingSource

_LAYER = re.compile(r"\.(?:h|layers|blocks)\.(\d+)\.")
# Parts of multimodal checkpoints that the text model does not have.
_NOT_TEXT = re.compile(r"(vision_tower|vision_model|multi_modal_projector|audio_tower)")


def check_arguments(arguments: dict[str, Any], keywords: dict[str, Any]) -> None:
    """Raise ArgumentError for arguments that mean nothing or contradict each other."""
    _check_checkpoint(arguments, keywords)
    _check_device(arguments)
    dtype = keywords.get("torch_dtype", arguments["dtype"])
    if not isinstance(dtype, torch.dtype) and dtype not in DTYPE_FROM_STRING:
        known = ", ".join(DTYPE_FROM_STRING)
        raise ArgumentError(f"dtype={dtype!r} is neither a torch.dtype nor one of {known}.")
    for name, least in (("first_n_layers", 0), ("n_ctx", 1)):
        value = arguments[name]
        if value is not None and (not isinstance(value, int) or value < least):
            raise ArgumentError(f"{name}={value!r} is not a number from {least} on.")


def _check_checkpoint(arguments: dict[str, Any], keywords: dict[str, Any]) -> None:
    names = ("checkpoint_index", "checkpoint_value", "checkpoint_label")
    given = [name for name in names if arguments[name] is not None]
    if "checkpoint_value" in given and "checkpoint_label" in given:
        raise ArgumentError(
            "checkpoint_value and checkpoint_label are two names of one thing: pass one of them."
        )
    if given and arguments["hf_model"] is not None:
        raise ArgumentError(
            f"{given[0]}= picks a checkpoint on the hub, but hf_model= already has weights: "
            "pass one of them."
        )
    if given and keywords.get("revision") is not None:
        raise ArgumentError(
            f"{given[0]}= and revision= both name a version of the weights: pass one of them."
        )


def _check_device(arguments: dict[str, Any]) -> None:
    n_devices = arguments["n_devices"]
    if not isinstance(n_devices, int) or n_devices < 1:
        raise ArgumentError(f"n_devices={n_devices!r} is not a number from 1 on.")
    device = _device(arguments)
    if device.type != "cuda":
        if n_devices > 1:
            raise ArgumentError(f"n_devices={n_devices} spreads over CUDA devices, not {device}.")
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) + n_devices > count:
        raise ArgumentError(
            f"device={arguments['device']!r} with n_devices={n_devices} needs "
            f"{(device.index or 0) + n_devices} CUDA devices, torch sees {count}."
        )


def _device(arguments: dict[str, Any]) -> torch.device:
    if arguments["device"] is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(arguments["device"])
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device={arguments['device']!r} is no device: {error}") from error


def check_quantization(origin: Origin, options: Options, arguments: dict[str, Any]) -> None:
    """Raise for quantization that contradicts the checkpoint, or that cannot run here."""
    if origin.spec is None and options.quantize is None:
        return
    if origin.spec is not None and options.quantize is not None:
        raise ArgumentError(
            f"{origin.label} is quantized already ({origin.spec.kind}): leave quantize= out, or "
            "take the unquantized checkpoint."
        )
    if origin.spec is not None and arguments["refactor_factored_attn_matrices"]:
        raise ArgumentError(
            "refactor_factored_attn_matrices=True mixes the values of several matrices, which "
            f"quantized bytes cannot follow. {origin.label} is quantized: load the unquantized "
            "checkpoint with quantize=, which refactors first."
        )
    if not options.assigns:
        raise ArgumentError(
            "Quantized weights are put into the model as they are, which a copying load cannot do: "
            f'use strategy="auto" with torch {compat.ASSIGN_NEEDS_TORCH} or newer.'
        )
    require_device(_device(arguments))


def check_layers(cfg: Any, origin: Origin) -> None:
    """Raise ArgumentError if more layers are asked for than the model has."""
    if origin.n_layers is not None and cfg.n_layers > origin.n_layers:
        raise ArgumentError(
            f"first_n_layers={cfg.n_layers}, but {origin.label} has {origin.n_layers} layers."
        )


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
            "The state dict has tensors of the wrong shape; the model is unchanged:\n  "
            + "\n  ".join(wrong)
        )


def check_recipes(model: Any, origin: Origin, recipes: dict[str, Promise]) -> None:
    """Raise MissingWeightsError for everything of the checkpoint that does not fit the model."""
    read = [view.source for promise in recipes.values() for view in sources(promise.node)]
    missing = sorted({source.name for source in read if isinstance(source, MissingSource)})
    problems = [f"missing: {name}" for name in missing] + _ledger_problems(origin)
    own = dict(model.named_parameters())
    for name, promise in recipes.items():
        if name in own and not _fits(promise, own[name]):
            found, wanted = tuple(promise.shape), tuple(own[name].shape)
            problems.append(f"misshapen: {name} comes out as {found} instead of {wanted}")
    unread = _unread(origin, {id(source) for source in read}, model.cfg.n_layers)
    problems += [f"no place in HookedTransformer for: {name}" for name in unread]
    _raise_for(origin, problems)


def explain(origin: Origin, error: Exception) -> None:
    """Raise MissingWeightsError if an error of a converter comes from weights that do not fit."""
    if isinstance(error, LeanLoadError):
        return
    problems = _ledger_problems(origin)
    if isinstance(origin.root, Branch) and isinstance(error, (AttributeError, KeyError)):
        problems.append(f"missing: a tensor that TransformerLens reads ({error})")
    _raise_for(origin, problems)


def check_room(needed_bytes: dict[torch.device, int], label: str) -> None:
    """Raise NotEnoughMemoryError if parameters cannot fit where they are to go.

    Args:
        needed_bytes: bytes to be allocated on each device.
        label: the model, for the message.
    """
    for device, needed in needed_bytes.items():
        free = available_bytes(device)
        if free is not None and needed > free:
            raise NotEnoughMemoryError(
                f"{label} needs {format_bytes(needed)} on {device}, where {format_bytes(free)} are "
                "free. Load it in a smaller dtype, with first_n_layers=, or unprocessed in the "
                "dtype of the file, which maps it."
            )


def _raise_for(origin: Origin, problems: list[str]) -> None:
    """Raise one MissingWeightsError with all problems, if there are any."""
    if problems:
        raise MissingWeightsError(
            f"{origin.label} does not fit the model that its configuration describes:\n  "
            + "\n  ".join(problems)
            + "\nNothing was loaded. Check that the checkpoint is complete and belongs to this "
            "config.json; to load it as transformers does, pass "
            "hf_model=AutoModelForCausalLM.from_pretrained(...)."
        )


def _ledger_problems(origin: Origin) -> list[str]:
    problems = [
        f"unexpected: {name}"
        for name in sorted(origin.ledger.unexpected)
        if not _NOT_TEXT.search(name)
    ]
    for name, (found, wanted) in sorted(origin.ledger.misshapen.items()):
        problems.append(f"misshapen: {name} is {found}, the configuration asks for {wanted}")
    return problems


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
