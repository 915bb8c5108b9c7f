"""Whether the values of a tensor are here to be read and written: the guard of everything that
works on a live model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tl_fastload.errors import ArgumentError, LeanLoadError
from tl_fastload.ground.words import listed
from tl_fastload.quantized import QuantizedTensor

_PLAIN = (torch.Tensor, nn.Parameter)
_UNHOOK = "accelerate.hooks.remove_hook_from_submodules(model)"


def why_not_here(tensor: torch.Tensor) -> str | None:
    """Why a tensor's values are not in this process, and what to do; None if they are."""
    kind = type(tensor).__name__
    if kind == "DTensor":
        return "is one process's part of a tensor (DTensor): gather it with full_tensor() first"
    if kind == "FlatParameter" or getattr(tensor, "_is_flat_param", False):
        return (
            "is one process's part of several parameters (FSDP): work inside of "
            "FullyShardedDataParallel.summon_full_params, on a model that is not wrapped"
        )
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:
        return "is partitioned by DeepSpeed: gather it with deepspeed.zero.GatheredParameters first"
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return "has no shape yet (a lazy module): run the module once first"
    return "is on the meta device and has no values" if tensor.is_meta else None


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are in this process, or in several that know of one another."""
    is_shared = type(tensor).__name__ == "DTensor"
    return not tensor.is_meta if is_shared else why_not_here(tensor) is None


def why_not_ours(tensor: torch.Tensor) -> str | None:
    """Why a tensor of a model cannot be read and written element by element, and what to do; None
    if it can, or is one of our own quantized ones.
    """
    reason = why_not_here(tensor)
    if reason is not None or isinstance(tensor, QuantizedTensor):
        return reason
    if type(tensor) not in _PLAIN:
        return (
            f"is a {type(tensor).__name__}, whose bytes are not its values: replace it by an "
            "ordinary torch.nn.Parameter first"
        )
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return f"is {tensor.layout}, {tensor.dtype}: make it an ordinary dense tensor first"
    return None


def require_values(
    model: nn.Module, doing: str, error: type[LeanLoadError] = ArgumentError
) -> None:
    """Raise if a parameter or buffer of a model is not here, or not ours to read and write.

    Args:
        model: any module.
        doing: what is refused, as a noun: "save_lean".
        error: what is raised; it names the first such tensors, and the way out.
    """
    found = dict(_problems(model))
    if found:
        name, reason = next(iter(found.items()))
        others = f" ({listed(list(found)[1:], 3)} likewise)" if len(found) > 1 else ""
        raise error(f"{doing} needs the model's own values, but {name} {reason}{others}.")


def require_here(module: nn.Module, doing: str) -> None:
    """Raise ArgumentError if a parameter of any module has no values in this process, or in several
    that know of one another.
    """
    for name, parameter in module.named_parameters():
        reason = why_not_here(parameter)
        if reason is not None and not has_values(parameter):
            way_out = _way_out(module, parameter)
            raise ArgumentError(f"{doing} needs values, but {name} {reason}{way_out}.")


def require_given(values: Mapping[str, Any], doing: str) -> None:
    """Raise ArgumentError if a tensor of a state dict has no values that can be read here."""
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            continue
        reason = why_not_here(value)
        if reason is None and (value.layout is not torch.strided or value.is_quantized):
            reason = f"is {value.layout}, {value.dtype}: make it an ordinary dense tensor first"
        if reason is not None:
            raise ArgumentError(f"{doing}: {name} of the state dict {reason}. Nothing was loaded.")


def _problems(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        yield from _hidden(name, module)
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            reason = None if tensor is None else why_not_ours(tensor)
            if reason is not None and tensor is not None:
                yield f"{name}.{leaf}" if name else leaf, reason + _way_out(model, tensor)


def _hidden(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Modules that compute or hold their parameters in another way than they look."""
    where = name or "the model"
    kind = type(module).__name__
    if kind == "FullyShardedDataParallel":
        yield where, "is wrapped in FSDP, which holds a part of it: work on the original module"
    elif kind == "ParametrizationList":
        yield (
            where.replace(".parametrizations.", "."),
            "is computed by a parametrization: "
            "torch.nn.utils.parametrize.remove_parametrizations first",
        )
    for leaf in module._parameters:
        if leaf.endswith("_orig") and f"{leaf[:-5]}_mask" in module._buffers:
            yield f"{where}.{leaf[:-5]}", "is pruned: torch.nn.utils.prune.remove it first"


def _way_out(model: nn.Module, tensor: torch.Tensor) -> str:
    if not tensor.is_meta:
        return ""
    if any("_hf_hook" in module.__dict__ for module in model.modules()):
        return f": it is offloaded by accelerate, and {_UNHOOK} brings it back"
    return ": load the model first"
