"""Whether a model's weights are processed already: by what was done to it, and by their values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

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
    if "fold_value_biases" in asked and any(bool(b.any()) for b in _value_biases(model)):
        return False
    if "center_writing_weights" in asked and not all(map(_is_centred, _writing(model))):
        return False
    return "center_unembed" not in asked or _is_centred(model.unembed.W_U)


def _value_biases(model: Any) -> Iterator[torch.Tensor]:
    for block in model.blocks:
        attention = dict(block.attn.named_parameters(recurse=False))
        yield attention["_b_V"] if "_b_V" in attention else attention["b_V"]


def _writing(model: Any) -> Iterator[torch.Tensor]:
    """What writes to the residual stream, with d_model last."""
    yield model.embed.W_E
    if hasattr(model, "pos_embed"):
        yield model.pos_embed.W_pos
    for block in model.blocks:
        yield block.attn.W_O
        yield block.attn.b_O
        for name, parameter in block.named_parameters():
            if name in ("mlp.W_out", "mlp.b_out"):
                yield parameter


@torch.no_grad()
def _is_centred(weight: torch.Tensor) -> bool:
    """Whether the mean over the last dimension is no more than rounding leaves."""
    mean = weight.mean(-1, dtype=torch.float32).abs().max()
    return bool(mean <= torch.finfo(weight.dtype).eps * weight.abs().max().float())
