"""The processing steps: which of them a model allows, and why not."""

from __future__ import annotations

from typing import Any

from tl_fastload.ground import compat
from tl_fastload.request.steps import STEPS

# Their norms act on a sublayer's output, where neither folding nor centring is valid.
_POST_NORM = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")


def reason_to_skip(step: str, cfg: Any) -> str | None:
    """Why a step does not apply to a model, or None if it does.

    Args:
        step: one of `request.steps.STEPS`.
        cfg: the model's HookedTransformerConfig.
    """
    norm = cfg.normalization_type
    if cfg.positional_embedding_type == "shortformer" and step in STEPS[:3]:
        return "shortformer attention adds positions to queries and keys only"
    if cfg.original_architecture in _POST_NORM and step in STEPS[:2]:
        return f"{cfg.original_architecture} normalises after each sublayer"
    if step == "fold_ln" and norm not in ("LN", "LNPre", "RMS", "RMSPre"):
        return "the model has no normalisation weights"
    if step == "fold_ln" and drops_norms(cfg):
        return f"TransformerLens {compat.TRANSFORMER_LENS} folds no norms in front of experts"
    if step in STEPS[:2] and norm in ("LN", "LNPre") and experts(cfg):
        # Neither the norm's bias nor the side of the experts' matrices that writes is seen to.
        return "TransformerLens folds and centres experts behind an RMSNorm only"
    if step == "center_writing_weights" and norm in ("RMS", "RMSPre"):
        return "RMSNorm does not remove the mean"
    if step == "center_writing_weights" and getattr(cfg, "final_rms", False):
        return "the final norm is an RMSNorm, which does not remove the mean"
    if step == "center_unembed" and getattr(cfg, "output_logits_soft_cap", None) not in (
        None,
        -1,
        -1.0,
        0,
    ):
        return "a soft cap on logits is not invariant under a shift"
    if step == "fold_value_biases" and getattr(cfg, "use_attention_sinks", False):
        return (
            "attention sinks make pattern rows sum to less than one, so the fold would change the "
            "model's output"
        )
    if step == "refactor_factored_attn_matrices" and cfg.positional_embedding_type == "rotary":
        return "rotary embeddings act between W_Q and W_K"
    return None


def drops_norms(cfg: Any) -> bool:
    """Whether stock's `from_pretrained` drops a model's norm weights when it is to fold them.

    TransformerLens 2 folds nothing into experts, but builds such a model without norm weights.

    Args:
        cfg: the model's HookedTransformerConfig.
    """
    return compat.REPLACES_NORMS and experts(cfg) > 1


def experts(cfg: Any) -> int:
    """How many experts each layer of a model has; none has zero."""
    return getattr(cfg, "num_experts", None) or 0


def describe(requested: dict[str, bool], cfg: Any) -> dict[str, str]:
    """What becomes of each step, for the report."""
    outcome: dict[str, str] = {}
    for step in STEPS:
        reason = reason_to_skip(step, cfg)
        if not requested.get(step, False):
            outcome[step] = "skipped: not asked for"
        else:
            outcome[step] = "done" if reason is None else f"skipped: {reason}"
    return outcome
