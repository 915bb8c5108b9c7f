"""Tensor parallelism: which heads and columns of a bridge are shared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from tl_fastload.bridge.quantizing import role_in
from tl_fastload.errors import ArgumentError

_SIDES = {"attention": "d_attn", "MLP": "d_mlp"}
_LAYERS = ("attn", "mlp")
_KEPT = ("query, key and value",)  # which nothing is computed with


def dims_to_share(held: Any, n_ranks: int) -> Callable[[str, torch.Size], list[int] | None]:
    """Which dimension of a parameter is shared among processes; None for one that all have whole.

    Args:
        held: what is filled in place of the bridge.
        n_ranks: how many processes there are.

    Raises:
        ArgumentError: heads or columns that do not divide, or matrices that are in neither.
    """
    cfg, places, bridge = held.cfg, held.shared_model.places, held.shared_model.model
    if len(_stacks(bridge)) != 1 or not bridge.adapter.supports_generation:
        kind = type(bridge.original_model).__name__
        raise ArgumentError(
            f'parallel="tp" shares the blocks of decoder-only models, and {kind} is '
            'built otherwise: use parallel="fsdp".'
        )
    n_kv_heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    if cfg.n_heads % n_ranks or n_kv_heads % n_ranks or cfg.d_mlp % n_ranks:
        raise ArgumentError(
            f'parallel="tp" shares heads and MLP columns among {n_ranks} processes, which does not '
            f"divide n_heads={cfg.n_heads}, n_key_value_heads={n_kv_heads} and d_mlp={cfg.d_mlp}: "
            'use parallel="fsdp", or fewer processes.'
        )
    blocks = {id(part) for stack in _stacks(bridge) for part in stack.modules()}
    inside = {id(part) for layer in layers(bridge) for part in layer.modules()}

    def shared(name: str, shape: torch.Size) -> list[int] | None:
        module = places[name][0][0]
        found = role_in(name, module, places)
        if found.kind not in ("matrix", "bias") or found.what in _KEPT or id(module) not in blocks:
            return None
        dim = found.dim(_SIDES.get(found.part, ""))
        if found.kind == "matrix" and (dim is None or id(module) not in inside):
            raise ArgumentError(
                f'parallel="tp" shares attention heads and MLP columns, and {name} is of neither '
                '(as experts, routers and recurrent layers are): use parallel="fsdp".'
            )
        return None if dim is None else [dim]

    return shared


def layers(bridge: Any, shared: Iterable[str] = ()) -> list[nn.Module]:
    """The modules that compute with parts: attention and MLP layers."""
    blocks: list[Any] = [block for stack in _stacks(bridge) for block in stack]
    found: list[Any] = [getattr(block, part, None) for block in blocks for part in _LAYERS]
    # Those without a name stand for what a model does in its block itself: they are never called.
    return [layer for layer in found if getattr(layer, "name", None) is not None]


def _stacks(bridge: Any) -> list[nn.ModuleList]:
    """The blocks of a bridge: of a decoder, or of an encoder and a decoder."""
    return [child for child in bridge.children() if isinstance(child, nn.ModuleList)]
