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

from tl_fastload.recipes.promise import Promise

_READ_LN1 = ("attn.W_Q", "attn.W_K", "attn.W_V", "attn._W_K", "attn._W_V")
_READ_LN2 = ("mlp.W_in", "mlp.W_gate")


def kernel_shifts(
    promises: Mapping[str, Promise], cfg: Any, flags: Mapping[str, bool]
) -> dict[str, Promise]:
    """Parameter name -> what is missing from its input after processing, as a vector [in].

    Args:
        promises: the state dict before processing.
        cfg: the model's configuration.
        flags: the processing steps that will run.
    """
    shifts: dict[str, Promise] = {}
    for layer in range(cfg.n_layers):
        prefix = f"blocks.{layer}."
        ln1_b = promises.get(prefix + "ln1.b") if flags["fold_ln"] else None
        ln2_b = promises.get(prefix + "ln2.b", ln1_b) if flags["fold_ln"] else None
        for names, bias in ((_READ_LN1, ln1_b), (_READ_LN2, ln2_b)):
            if bias is not None and bias.shape == (cfg.d_model,):
                shifts.update({prefix + name: bias for name in names if prefix + name in promises})
        value_bias = _value_bias(promises, prefix, ln1_b)
        if flags["fold_value_biases"] and value_bias is not None:
            groups = cfg.n_heads // value_bias.shape[0]
            spread = torch.repeat_interleave(value_bias, groups, dim=0)
            shifts[prefix + "attn.W_O"] = spread.reshape(-1)  # type: ignore[assignment]
    return shifts


def _value_bias(promises: Mapping[str, Promise], prefix: str, ln1_b: Any) -> Any:
    """The bias [head, d_head] of the values, with what the norm's bias adds to it."""
    underscore = "_" if prefix + "attn._W_V" in promises else ""
    bias: Any = promises.get(f"{prefix}attn.{underscore}b_V")
    weight = promises.get(f"{prefix}attn.{underscore}W_V")
    if ln1_b is None or weight is None or ln1_b.shape != weight.shape[1:2]:
        return bias
    folded = (weight.float() * ln1_b.float()[None, :, None]).sum(-2)
    return folded if bias is None else bias.float() + folded
