"""The processing steps of a bridge: which of them a model allows, and whether they were done."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from tl_fastload.bridge import versions
from tl_fastload.errors import ArgumentError, warn_numbers

_LAYER_NORMS = ("LN", "LNPre")
_WITH_SINKS = ("GptOssForCausalLM",)


def why_skipped(step: str, cfg: Any) -> str | None:
    """Why TransformerLens leaves out a step for a model of this configuration; None if it runs."""
    adapter = versions.adapters().get(getattr(cfg, "architecture", None) or "")
    name = getattr(adapter, "__name__", "")
    norm = getattr(cfg, "normalization_type", "LN")
    if step == "fold_ln" and not getattr(adapter, "supports_fold_ln", True):
        return f"{name} does not support it"
    if step == "center_writing_weights":
        if not getattr(adapter, "supports_center_writing_weights", True):
            return f"{name} does not support it"
        if norm not in _LAYER_NORMS or getattr(cfg, "final_rms", False):
            return "RMSNorm does not remove the mean"
    if step == "center_unembed" and (getattr(cfg, "output_logits_soft_cap", None) or 0) > 0:
        return "a soft cap on logits is not invariant under a shift"
    if step == "fold_value_biases" and getattr(cfg, "architecture", None) in _WITH_SINKS:
        return (
            "attention sinks make pattern rows sum to less than one, so the fold would change the "
            "model's output"
        )
    return None


def check_flags(cfg: Any, flags: Mapping[str, bool]) -> None:
    """Raise ArgumentError for steps that a model of this configuration cannot even skip."""
    is_rotary = getattr(cfg, "positional_embedding_type", "standard") == "rotary"
    if flags.get("refactor_factored_attn_matrices") and is_rotary:
        raise ArgumentError(
            "refactor_factored_attn_matrices=True cannot be done here: rotary embeddings act "
            "between W_Q and W_K. Leave it out."
        )


def with_right_steps(stock: Callable[..., None], bridge: Any, args: Any, kwargs: Any) -> Any:
    """The arguments of `process_weights` without steps that would change the model's output.

    Args:
        stock: TransformerLens' bound method.
        bridge: the bridge.
        args: the caller's.
        kwargs: the caller's.
    """
    bound = inspect.signature(stock).bind(*args, **kwargs)
    bound.apply_defaults()
    check_flags(bridge.cfg, bound.arguments)
    reason = why_skipped("fold_value_biases", bridge.cfg)
    if bound.arguments["fold_value_biases"] and reason is not None:
        bound.arguments["fold_value_biases"] = False
        warn_numbers(f"fold_value_biases is left out: {reason}.")
    return bound.arguments
