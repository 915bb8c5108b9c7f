"""Times forward passes of a loaded model. Runs inside the measured process."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

_WARM_UPS = 2
_LEAST_RUNS = 5
_MOST_RUNS = 25
_ENOUGH_SECONDS = 5.0
_SAMPLED_TOKENS = 16
_SAMPLED_LOG_PROBS = 64


def time_forward(model: Any, n_tokens: int) -> float:
    """Median seconds of a forward pass at batch 1, after warm-up.

    Args:
        model: a `HookedTransformer`, or a Hugging Face model.
        n_tokens: length of the sequence.
    """
    tokens = _tokens(model, n_tokens)
    seconds: list[float] = []
    with torch.inference_mode():
        for _ in range(_WARM_UPS):
            _logits(model, tokens)
        synchronize(tokens.device)
        while len(seconds) < _LEAST_RUNS or (
            len(seconds) < _MOST_RUNS and sum(seconds) < _ENOUGH_SECONDS
        ):
            start = time.perf_counter()
            _logits(model, tokens)
            synchronize(tokens.device)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def sample_log_probs(model: Any) -> list[float]:
    """Log-probabilities of some next tokens, to see that the models compared are the same.

    transformers' model computes attention step by step for them, as TransformerLens does: its fused
    kernel rounds differently, which 8-bit layers turn into other codes.
    """
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = _logits(model, _tokens(model, _SAMPLED_TOKENS))[0, -1]
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    sampled: list[float] = log_probs[:: max(1, len(log_probs) // _SAMPLED_LOG_PROBS)].tolist()
    return sampled


def synchronize(device: torch.device) -> None:
    """Wait for what a device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tokens(model: Any, n_tokens: int) -> torch.Tensor:
    config = getattr(model, "cfg", None)
    d_vocab = config.d_vocab if config is not None else model.config.vocab_size
    generator = torch.Generator().manual_seed(n_tokens)
    tokens = torch.randint(d_vocab, (1, n_tokens), generator=generator)
    return tokens.to(next(model.parameters()).device)


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    is_hooked = hasattr(model, "cfg")
    logits = model(tokens) if is_hooked else model(tokens, use_cache=False).logits
    assert isinstance(logits, torch.Tensor)
    return logits
