"""Finds induction heads: heads that look for what followed the present token last time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

PERIOD = 50
ROWS = 8


@dataclass(frozen=True)
class HeadScore:
    """Mean attention of one head, 0 to 1, over the second copy of repeated random tokens."""

    layer: int
    head: int
    previous_token: float
    induction: float

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.head}"


def repeated_tokens(first_id: int, end_id: int, bos_id: int, seed: int = 0) -> torch.Tensor:
    """BOS and then `PERIOD` random token ids twice: `[ROWS, 1 + 2 * PERIOD]`.

    Args:
        first_id: the random ids are at least this.
        end_id: the random ids are less than this.
        bos_id: the id that starts each row.
        seed: of the random ids.
    """
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(first_id, end_id, (ROWS, PERIOD), generator=generator)
    return torch.cat([torch.full((ROWS, 1), bos_id), half, half], dim=1)


def head_scores(model: Any, tokens: torch.Tensor) -> list[HeadScore]:
    """The scores of every head on `repeated_tokens(...)`, by layer and head."""
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
    scores = []
    for layer in range(model.cfg.n_layers):
        pattern = cache["pattern", layer].mean(dim=0)  # [head, query, key]
        for head, attention in enumerate(pattern):
            # Query q of the second copy: the token after its first occurrence is at q - (P - 1).
            induction = attention.diagonal(-(PERIOD - 1))[2:].mean().item()
            previous = attention.diagonal(-1)[PERIOD:].mean().item()
            scores.append(HeadScore(layer, head, previous, induction))
    return scores


def copy_losses(model: Any, tokens: torch.Tensor) -> tuple[float, float]:
    """Mean loss (nats a token) on the first and on the second copy of `repeated_tokens(...)`."""
    with torch.inference_mode():
        logits = model(tokens)[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    loss = loss.view(len(tokens), -1)
    # The first token of the second copy cannot be known: nothing says that a copy begins.
    return loss[:, :PERIOD].mean().item(), loss[:, PERIOD + 1 :].mean().item()
