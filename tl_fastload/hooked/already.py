"""Whether a model's weights are processed already: by what was done to it, and by their values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tl_fastload.ground.role import Role
from tl_fastload.hooked.names import role
from tl_fastload.hooked.steps import reason_to_skip
from tl_fastload.quantized import QuantizedTensor, has_quantized


def is_already_processed(model: Any, flags: dict[str, bool]) -> bool:
    """Whether these steps were done and no parameter has changed since; the report says so then."""
    asked = {step for step, value in flags.items() if value}
    done, at_the_time = getattr(model, "_processed", (set(), None))
    if not asked <= done or versions(model) != at_the_time:
        return False
    # Quantized bytes cannot be edited in place; other values can, unseen, through `.data`.
    if not has_quantized(model) and not is_processed(model, flags):
        return False
    note = "process_weights_ was called again with nothing changed: nothing was done."
    model.load_report = replace(model.load_report, notes=(*model.load_report.notes, note))
    return True


def versions(model: nn.Module) -> list[tuple[str, int, int]]:
    """Changes whenever a parameter is replaced or written to."""
    return [
        (name, _address(p), p._version)
        for name, p in model.named_parameters()
        if p.numel() and not p.is_inference()
    ]


def _address(parameter: torch.Tensor) -> int:
    if isinstance(parameter, QuantizedTensor):
        return next(iter(parameter.content.tensors().values())).data_ptr()
    return parameter.data_ptr()


def is_processed(model: Any, flags: dict[str, bool]) -> bool:
    """Whether every step that is asked for, and that the model allows, would change nothing.

    Args:
        model: a HookedTransformer.
        flags: the processing steps.
    """
    asked = [step for step, on in flags.items() if on and reason_to_skip(step, model.cfg) is None]
    if "refactor_factored_attn_matrices" in asked:
        return False
    if "fold_ln" in asked and not str(model.cfg.normalization_type).endswith("Pre"):
        return False
    return not any(
        _changes(step, role(name), parameter)
        for name, parameter in model.named_parameters()
        for step in asked
    )


def _changes(step: str, role: Role, parameter: torch.Tensor) -> bool:
    """Whether a step would change a parameter, by its values."""
    if step == "fold_value_biases":
        return role.what == "value" and role.is_bias and bool(parameter.any())
    dim = role.writes if step == "center_writing_weights" else None
    if step == "center_unembed" and role.what == "unembedding" and not role.is_bias:
        dim = role.order[0]
    return dim is not None and not _is_centred(parameter, dim)


@torch.no_grad()
def _is_centred(weight: torch.Tensor, dim: int) -> bool:
    """Whether the mean over a dimension is no more than rounding leaves."""
    mean = weight.mean(dim, dtype=torch.float32).abs().max()
    return bool(mean <= torch.finfo(weight.dtype).eps * weight.abs().max().float())
