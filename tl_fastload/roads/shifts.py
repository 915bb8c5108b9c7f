"""What weight processing takes out of the activations in front of each quantized matrix.

Hugging Face's quantized layer multiplies `norm(x) * w + b`, and an output projection the attention
output with the value bias in it. Folding moves `b` and the value bias into other biases, so that
the matrix meets an activation that lies elsewhere. The 8-bit kernel rounds activations: it gets
them moved back (`QuantizedTensor.shift_input`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tl_fastload.ground.role import ATTENTION_NORM, MLP_NORM, RoleOf, by_place
from tl_fastload.recipes.promise import Promise


def kernel_shifts(
    promises: Mapping[str, Promise], role: RoleOf, cfg: Any, flags: Mapping[str, bool]
) -> dict[str, Promise]:
    """Parameter name -> what is missing from its input after processing, as a vector [in].

    Args:
        promises: the state dict before processing.
        role: what each of its names is.
        cfg: the model's configuration.
        flags: the processing steps that will run.
    """
    at = by_place(promises, role)

    def find(layer: int | None, what: str, is_bias: bool) -> Any:
        return promises.get(at.get((layer, what, is_bias), ""))

    def norm_bias(layer: int | None, norm: str) -> Any:
        found = find(layer, norm, True) if flags["fold_ln"] else None
        # A block with one norm has it in front of both.
        return norm_bias(layer, ATTENTION_NORM) if found is None and norm == MLP_NORM else found

    shifts: dict[str, Any] = {}
    for name, promise in promises.items():
        matrix = role(name)
        if not matrix.is_projection:
            continue
        bias = norm_bias(matrix.layer, matrix.reads)
        if bias is not None and bias.shape == (promise.shape[matrix.order[-1]],):
            shifts[name] = bias
        if matrix.what == "output" and flags["fold_value_biases"]:
            bias, weight = (find(matrix.layer, "value", is_bias) for is_bias in (True, False))
            order = role(at[matrix.layer, "value", False]).order if weight is not None else ()
            value_bias = _value_bias(bias, weight, norm_bias(matrix.layer, ATTENTION_NORM), order)
            if value_bias is not None:
                heads = value_bias.reshape(-1, cfg.d_head)
                groups = cfg.n_heads // heads.shape[0]
                shifts[name] = torch.repeat_interleave(heads, groups, dim=0).reshape(-1)
    return shifts


def _value_bias(bias: Any, weight: Any, norm_bias: Any, order: tuple[int, ...]) -> Any:
    """The bias of the values, with what the norm's bias adds to it, one head after the other."""
    if norm_bias is None or weight is None or norm_bias.shape[0] != weight.shape[order[-1]]:
        return bias
    folded = (weight.permute(order).float() * norm_bias.float()).sum(-1).reshape(-1)
    return folded if bias is None else bias.float().reshape(-1) + folded
