"""The processing steps of a bridge: which of them a model allows, and whether they were done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tl_fastload.bridge import versions
from tl_fastload.errors import (
    ArgumentError,
    HalfWrittenError,
    LeanLoadError,
    UnsupportedArchitectureError,
    is_out_of_memory,
    warn_numbers,
)
from tl_fastload.ground.mark import is_half_written
from tl_fastload.request.steps import STEPS

_OF_STOCK = (RuntimeError, NotImplementedError, LookupError, ValueError, AttributeError, TypeError)
_LAYER_NORMS = ("LN", "LNPre")
_WRONG = {
    ("GptOssForCausalLM", "fold_value_biases"): (
        "attention sinks make pattern rows sum to less than one, so the fold would change the "
        "model's output"
    ),
    ("FalconH1ForCausalLM", "fold_ln"): (
        "TransformerLens folds the norm into attention alone, and the state space reads it as well"
    ),
}
"""Architecture, step -> why what TransformerLens does there changes the model's output."""

_WRONG_AT_ALL = {
    "BitNetForCausalLM": (
        "BitNet's layers quantize their weights as they run, which TransformerLens' processing "
        "does not foresee: the output is another one (boot_transformers_lean leaves it as it is)"
    ),
}


def why_skipped(step: str, cfg: Any) -> str | None:
    """Why a step is left out for a model of this configuration; None if it runs."""
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
    return _why_wrong(step, cfg)


def _why_wrong(step: str, cfg: Any) -> str | None:
    """Why TransformerLens' step would change the model's output; None if it does not."""
    architecture = getattr(cfg, "architecture", None)
    width = getattr(cfg, "moe_intermediate_size", None) or 0
    if (architecture, step) == ("Ernie4_5_MoeForCausalLM", "fold_ln") and 2 * width == cfg.d_model:
        return "TransformerLens folds the norm into the wrong side of square experts"
    return _WRONG.get((str(architecture), step))


def check_flags(cfg: Any, flags: Mapping[str, bool]) -> None:
    """Raise ArgumentError for steps that a model of this configuration cannot even skip."""
    is_rotary = getattr(cfg, "positional_embedding_type", "standard") == "rotary"
    if flags.get("refactor_factored_attn_matrices") and is_rotary:
        raise ArgumentError(
            "refactor_factored_attn_matrices=True cannot be done here: rotary embeddings act "
            "between W_Q and W_K. Leave it out."
        )


def steps_of(model: Any, asked: Mapping[str, bool]) -> dict[str, bool]:
    """As `tl_fastload.roads.road.Road.steps_of`: weights say nothing, norms stay where they are."""
    if not versions.is_processed(model):
        wanted = [step for step, on in asked.items() if on]
        if wanted:
            raise ArgumentError(
                f"processing={{{wanted[0]!r}: True}} is for a bridge whose weights are processed. "
                "Load the weights as they are, then call enable_compatibility_mode()."
            )
        return dict.fromkeys(STEPS, False)
    done = getattr(model, "_processed", (None, None))[0]
    if done is None and set(STEPS) - set(asked):
        raise (HalfWrittenError if is_half_written(model) else ArgumentError)(
            "It is not known how the bridge's weights were processed. Pass processing= with all of "
            f"{', '.join(STEPS)}."
        )
    return {**{step: step in (done or ()) for step in STEPS}, **asked}


def right_steps(cfg: Any, flags: Mapping[str, bool]) -> dict[str, bool]:
    """The steps that are asked for, without those that would change the model's output.

    Warns with NumbersWarning of each that is left out.

    Raises:
        ArgumentError: a step that such a model cannot even skip.
    """
    check_flags(cfg, flags)
    found = dict(flags)
    for step, is_on in flags.items():
        reason = _why_wrong(step, cfg)
        if is_on and reason is not None:
            found[step] = False
            warn_numbers(f"{step} is left out: {reason}.")
    at_all = _WRONG_AT_ALL.get(str(getattr(cfg, "architecture", None)))
    if at_all is not None:
        warn_numbers(f"{at_all}.")
    return found


def run_stock(stock: Callable[[], None]) -> None:
    """Run TransformerLens' processing, with an error of this family if it does not take the model.

    Raises:
        UnsupportedArchitectureError: it does not.
    """
    try:
        stock()
    except _OF_STOCK as error:
        if isinstance(error, LeanLoadError) or is_out_of_memory(error):
            raise
        raise UnsupportedArchitectureError(
            f"TransformerLens' processing does not take this model ({type(error).__name__}: "
            f"{error}). LeanTransformerBridge.boot_transformers_lean loads it unprocessed."
        ) from error
