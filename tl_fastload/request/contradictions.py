"""Arguments that contradict each other or this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tl_fastload.errors import ArgumentError
from tl_fastload.quantized.spec import as_dtype
from tl_fastload.request.keywords import Keywords

CHECKPOINT_ARGUMENTS = ("checkpoint_index", "checkpoint_value", "checkpoint_label")
"""Each picks a training checkpoint on the hub."""


def check_arguments(arguments: Mapping[str, Any], keywords: Keywords) -> None:
    """Raise ArgumentError for arguments that contradict each other or this machine.

    What each may be by itself, `tl_fastload.request.argument_types` has asked.
    """
    _check_checkpoint(arguments, keywords)
    _check_device(arguments)
    _check_dtype(arguments)


def check_device_map(device_map: Any, max_memory: Any, arguments: Mapping[str, Any]) -> None:
    """Raise ArgumentError for a device map beside other arguments that say where a model goes."""
    if max_memory is not None and not isinstance(device_map, str):
        raise ArgumentError(
            'max_memory= limits the maps that are made here: pass device_map="auto" with it, or '
            "leave it out."
        )
    if device_map is None:
        return
    others = {"device": None, "n_devices": 1, "move_to_device": True, "mesh": None}
    for name, default in others.items():
        if arguments[name] != default:
            raise ArgumentError(
                f"device_map= says where each part goes, and {name}={arguments[name]!r} as well: "
                "pass one of them."
            )


def _check_dtype(arguments: Mapping[str, Any]) -> None:
    if "torch_dtype" not in arguments:
        return
    one, other = as_dtype(arguments["torch_dtype"]), as_dtype(arguments["dtype"])
    if one != other and other != torch.float32:
        raise ArgumentError(f"torch_dtype={one} and dtype={other} contradict each other.")


def _check_checkpoint(arguments: Mapping[str, Any], keywords: Keywords) -> None:
    given = [name for name in CHECKPOINT_ARGUMENTS if arguments[name] is not None]
    if given[-2:] == ["checkpoint_value", "checkpoint_label"]:
        raise ArgumentError("checkpoint_value and checkpoint_label are aliases: pass one of them.")
    if len(given) > 1:
        raise ArgumentError(
            f"{' and '.join(given)} each pick a training checkpoint: pass one of them."
        )
    names = dict.fromkeys(given, "picks a checkpoint on the hub")
    if keywords.hub.get("gguf_file") is not None:
        names["gguf_file"] = "names weights"
    if names and arguments["hf_model"] is not None:
        name, what = next(iter(names.items()))
        raise ArgumentError(f"{name}= {what}, but hf_model= already has weights: pass one of them.")
    if given and keywords.hub.get("revision") is not None:
        raise ArgumentError(
            f"{given[0]}= and revision= both name a version of the weights: pass one of them."
        )


def _check_device(arguments: Mapping[str, Any]) -> None:
    n_devices = arguments["n_devices"]
    device = device_asked_for(arguments)
    if device.type != "cuda":
        if n_devices > 1:
            raise ArgumentError(f"n_devices={n_devices} spreads over CUDA devices, not {device}.")
        check_usable(device, f"device={str(device)!r}")
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) + n_devices > count:
        several = f" with n_devices={n_devices}" if n_devices > 1 else ""
        raise ArgumentError(
            f"device={str(device)!r}{several} needs more CUDA devices than torch sees, which is "
            f"{count}. Take device='cpu'"
            + (", or fewer devices." if count else ", or install a torch that is built for CUDA.")
        )


def device_asked_for(arguments: Mapping[str, Any]) -> torch.device:
    """The device that `device=` means.

    Raises:
        ArgumentError: it is none.
    """
    if arguments["device"] is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(arguments["device"])
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device={arguments['device']!r} is no device: {error}") from error


def check_usable(device: torch.device, asked: str) -> None:
    """Raise ArgumentError for a device that cannot hold weights here.

    Args:
        device: the device.
        asked: what asks for it, for the message.
    """
    try:
        torch.empty(1, device=device).add(1).cpu()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"{asked} cannot hold weights here: {reason}") from error
