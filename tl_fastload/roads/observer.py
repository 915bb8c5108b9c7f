"""What is told of the memory that TransformerLens would hold while its code runs on promises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn


class Observer(Protocol):
    """Told of what stock would hold; `tl_fastload.planning.stock_memory.StockLedger` adds it up."""

    def hold(self, promises: Iterable[torch.Tensor], *, caller_holds: bool) -> None:
        """transformers' model is there; `caller_holds` says that it is the caller's."""

    def hand_over(self, root: Any, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """transformers' model is let go of; returns the state dict with promises of its own."""

    def prepare(self, model: nn.Module) -> None:
        """The new model is built."""

    def load(self, state_dict: Mapping[str, Any]) -> None:
        """A state dict is loaded, and nobody needs it after that."""
