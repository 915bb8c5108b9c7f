"""Tensor parallelism: which heads and columns of a bridge are shared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from tl_fastload.bridge.quantizing import role_in
from tl_fastload.errors import ArgumentError

_COMPARED = ("gpt2", "llama")
"""`model_type` of what has been compared with one process."""

_SIDES = {"attention": "d_attn", "MLP": "d_mlp"}
_KEPT = ("query, key and value",)  # which nothing is computed with


def dims_to_share(held: Any, n_ranks: int) -> Callable[[str, torch.Size], list[int] | None]:
    """Which dimension of a parameter is shared among processes; None for one that all have whole.

    Args:
        held: what is filled in place of the bridge.
        n_ranks: how many processes there are.

    Raises:
        ArgumentError: another architecture, or heads or columns that do not divide.
    """
    config = held.shared_model.root.config
    if config.model_type not in _COMPARED:
        raise ArgumentError(
            f'parallel="tp" shares bridges of {" and ".join(_COMPARED)}, and this is a '
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

    places = held.shared_model.places

    def shared(name: str, shape: torch.Size) -> list[int] | None:
        found = role_in(name, places[name][0][0], places)
        if found.kind not in ("matrix", "bias") or found.what in _KEPT:
            return None
        dim = found.dim(_SIDES.get(found.part, ""))
        return None if dim is None else [dim]

    return shared


def layers(bridge: Any, shared: Iterable[str]) -> list[nn.Module]:
    """The modules that compute with parts: attention and MLP layers."""
    lists: list[Any] = [child for child in bridge.children() if isinstance(child, nn.ModuleList)]
    return [layer for blocks in lists for block in blocks for layer in (block.attn, block.mlp)]
