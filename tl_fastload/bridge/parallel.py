"""Tensor parallelism: which heads and columns of a bridge are shared."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from tl_fastload.errors import ArgumentError

# Pattern of a name -> which dimension of the matrix is shared, and which of the bias. Linear
# matrices are [out, in], those of GPT-2 [in, out].
_GPT2 = {
    r"\.attn\.[qkv]\.": (0, 0),
    r"\.attn\.o\.": (0, None),
    r"\.mlp\.c_fc\.": (1, 0),
    r"\.mlp\.c_proj\.": (0, None),
}
_LLAMA = {
    r"\.self_attn\.[qkv]_proj\.": (0, 0),
    r"\.self_attn\.o_proj\.": (1, None),
    r"\.mlp\.(gate|up)_proj\.": (0, 0),
    r"\.mlp\.down_proj\.": (1, None),
}
_DIMS = {"gpt2": _GPT2, "llama": _LLAMA}
"""By `model_type` of transformers' configuration."""


def dims_to_share(held: Any, n_ranks: int) -> Callable[[str, torch.Size], list[int] | None]:
    """Which dimension of a parameter is shared among processes; None for one that all have whole.

    Args:
        held: what is filled in place of the bridge.
        n_ranks: how many processes there are.

    Raises:
        ArgumentError: another architecture, or heads or columns that do not divide.
    """
    config = held.shared_model.root.config
    if config.model_type not in _DIMS:
        raise ArgumentError(
            f'parallel="tp" shares bridges of {" and ".join(_DIMS)}, and this is a '
            f'{config.model_type}: use parallel="fsdp", or LeanHookedTransformer.'
        )
    cfg = held.cfg
    n_kv_heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    if cfg.n_heads % n_ranks or n_kv_heads % n_ranks or cfg.d_mlp % n_ranks:
        raise ArgumentError(
            f'parallel="tp" shares heads and MLP columns among {n_ranks} processes, which does not '
            f"divide n_heads={cfg.n_heads}, n_key_value_heads={n_kv_heads} and d_mlp={cfg.d_mlp}: "
            'use parallel="fsdp", or fewer processes.'
        )

    def shared(name: str, shape: torch.Size) -> list[int] | None:
        for pattern, (matrix, bias) in _DIMS[config.model_type].items():
            if re.search(pattern, name):
                dim = matrix if len(shape) > 1 else bias
                return None if dim is None else [dim]
        return None

    return shared


def layers(bridge: Any, shared: Iterable[str]) -> list[nn.Module]:
    """The modules that compute with parts: attention and MLP layers."""
    return [layer for block in bridge.blocks for layer in (block.attn, block.mlp)]
