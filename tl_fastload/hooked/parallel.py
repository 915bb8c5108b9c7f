"""Tensor parallelism: which heads and columns of a HookedTransformer are shared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from tl_fastload.errors import ArgumentError
from tl_fastload.hooked.names import role
from tl_fastload.roads.road import home_of

_SIDES = {"attention": "head", "MLP": "d_mlp"}


def dims_to_share(model: Any, n_ranks: int) -> Callable[[str, torch.Size], list[int] | None]:
    """Which dimension of a parameter is shared among processes; None for one that all have whole.

    Args:
        model: the model.
        n_ranks: how many processes there are.

    Raises:
        ArgumentError: it has experts, or no heads or columns that divide.
    """
    cfg = model.cfg
    if getattr(cfg, "num_experts", None):
        raise ArgumentError(
            f'parallel="tp" cannot share experts (num_experts={cfg.num_experts}): use '
            'parallel="fsdp".'
        )
    columns = 0 if cfg.attn_only else cfg.d_mlp
    if cfg.n_heads % n_ranks and (columns % n_ranks or not columns):
        raise ArgumentError(
            f'parallel="tp" shares heads and MLP columns among {n_ranks} processes, and neither '
            f'n_heads={cfg.n_heads} nor d_mlp={columns} divides: use parallel="fsdp", or fewer '
            "processes."
        )

    def shared(name: str, shape: torch.Size) -> list[int] | None:
        found = role(name)
        side = _SIDES.get(found.part, "")
        dim = found.dim(side) if found.kind in ("matrix", "bias") else None
        whole = side == "head" and cfg.n_heads % n_ranks
        return None if dim is None or shape[dim] % n_ranks or whole else [dim]

    return shared


def layers(model: Any, shared: Iterable[str]) -> list[nn.Module]:
    """The modules that compute with parts: attention and MLP layers.

    Args:
        model: the model.
        shared: its parameters that are parts.
    """
    found = {id(layer): layer for layer, _ in (home_of(model, name) for name in shared)}
    return list(found.values())
