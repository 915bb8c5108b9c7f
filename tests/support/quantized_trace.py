"""Where two models with the same 8-bit weights part: the activations that reach their kernels.

An 8-bit kernel rounds activations to 127 steps of each row's largest value. Two models whose
activations agree to the last bits of float32 may still round one of them to neighbouring steps,
and then differ by what one step is worth.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from tests.support import quantized_zoo as qz
from tl_fastload.quantized.formats.bitsandbytes_bytes import Int8Bytes

# float32 noise of a layer or two, against activations of about 4.
_SAME = 2e-5


def kernel_inputs_of_hf(hf: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What reaches the kernels of a transformers model, in order; repeated ones once."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: _add(seen, args[0]))
        for _, layer in qz.layers(hf)
    ]
    with torch.no_grad():
        hf(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def kernel_inputs_of(
    model: Any, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    """What reaches the kernels of a `HookedTransformer`, in order; repeated ones once."""
    seen: list[torch.Tensor] = []
    linear = Int8Bytes.linear

    def recorded(stored: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        _add(seen, x)
        return linear(stored, x, *args)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Int8Bytes, "linear", recorded)
        model(tokens)
    return seen


def log_probs_on_their_inputs(
    model: Any, tokens: torch.Tensor, theirs: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """Log-probabilities of a `HookedTransformer` whose kernels get the transformers model's
    activations in place of its own, from which they must not differ by more than float noise.

    What is left of a gap then does not come from rounding.
    """
    mine: list[torch.Tensor] = []
    linear = Int8Bytes.linear

    def snapped(stored: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        _add(mine, x)
        their = theirs[len(mine) - 1]
        assert (mine[-1] - their).abs().max() < _SAME
        return linear(stored, their.reshape(x.shape), *args)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Int8Bytes, "linear", snapped)
        found = model(tokens).float().log_softmax(-1)
    assert len(mine) == len(theirs)
    return found


def parts_by_rounding(
    theirs: list[torch.Tensor], ours: list[torch.Tensor], threshold: float
) -> bool:
    """Whether the first activations that the kernels see differently differ by one step each,
    and agreed before they were rounded.
    """
    assert len(theirs) == len(ours)
    for one, other in zip(theirs, ours, strict=True):
        assert (one - other).abs().max() < _SAME
        steps = (_rounded(one, threshold) - _rounded(other, threshold)).abs()
        if steps.any():
            return int(steps.max()) == 1 and int(steps.sum()) < 10
    return False


def _rounded(x: torch.Tensor, threshold: float) -> torch.Tensor:
    codes, _, _ = bnb.functional.int8_vectorwise_quant(x.half(), threshold)
    return codes.int()


def _add(seen: list[torch.Tensor], x: torch.Tensor) -> None:
    rows = x.detach().reshape(-1, x.shape[-1])
    if not seen or seen[-1].shape != rows.shape or not torch.equal(seen[-1], rows):
        seen.append(rows.clone())
