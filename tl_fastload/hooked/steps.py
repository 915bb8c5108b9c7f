"""The processing steps: which of them a model allows and why not, and whether they were done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tl_fastload.errors import ArgumentError, HalfWrittenError
from tl_fastload.ground import compat
from tl_fastload.ground.mark import is_half_written
from tl_fastload.ground.role import Role
from tl_fastload.hooked.names import role
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


def check_refactor(cfg: Any, flags: Mapping[str, bool]) -> None:
    """Raise ArgumentError if matrices are to be refactored that rotary embeddings stand between."""
    step = "refactor_factored_attn_matrices"
    reason = reason_to_skip(step, cfg)
    if flags[step] and reason is not None:
        raise ArgumentError(f"{step}=True cannot be done: {reason}. Leave it out.")


def steps_of(model: Any, asked: Mapping[str, bool]) -> dict[str, bool]:
    """As `tl_fastload.roads.road.Road.steps_of`: what a model was loaded with counts, or else what
    its weights look like.
    """
    done = getattr(model, "_processed", (None, None))[0]
    if done is None and is_half_written(model) and set(STEPS) - set(asked):
        raise HalfWrittenError(
            "The model is half-written, so its weights do not tell how they were processed. Pass "
            f"processing= with all of {', '.join(STEPS)}."
        )
    flags = {
        step: step in done if done is not None else _looks_processed(model, step) for step in STEPS
    }
    flags.update(asked)
    folded = str(model.cfg.normalization_type).endswith("Pre")
    if "fold_ln" in asked and flags["fold_ln"] != folded:
        state = "folded" if folded else "with weights of their own"
        raise ArgumentError(
            f"processing={{'fold_ln': {flags['fold_ln']}}} does not fit the model, whose norms are "
            f"{state} ({model.cfg.normalization_type}). Leave fold_ln out, or load the model anew."
        )
    flags["fold_ln"] = folded or (
        flags["fold_ln"] and reason_to_skip("fold_ln", model.cfg) is not None
    )
    return flags


@torch.no_grad()
def _looks_processed(model: Any, step: str) -> bool:
    return reason_to_skip(step, model.cfg) is None and is_processed(model, {step: True})


def is_processed(model: Any, flags: Mapping[str, bool]) -> bool:
    """Whether every step that is asked for, and that the model allows, would change nothing.

    Args:
        model: a HookedTransformer.
        flags: the processing steps.
    """
    asked = [step for step, on in flags.items() if on and reason_to_skip(step, model.cfg) is None]
    if "refactor_factored_attn_matrices" in asked:
        return False
    if "fold_ln" in asked and not str(model.cfg.normalization_type).endswith("Pre"):
        return False
    return not any(
        _changes(step, role(name), parameter)
        for name, parameter in model.named_parameters()
        for step in asked
    )


def _changes(step: str, role: Role, parameter: torch.Tensor) -> bool:
    """Whether a step would change a parameter, by its values."""
    if step == "fold_value_biases":
        return role.what == "value" and role.is_bias and bool(parameter.any())
    dim = role.writes if step == "center_writing_weights" else None
    if step == "center_unembed" and role.what == "unembedding" and not role.is_bias:
        dim = role.order[0]
    return dim is not None and not _is_centred(parameter, dim)


@torch.no_grad()
def _is_centred(weight: torch.Tensor, dim: int) -> bool:
    """Whether the mean over a dimension is no more than rounding leaves."""
    mean = weight.mean(dim, dtype=torch.float32).abs().max()
    return bool(mean <= torch.finfo(weight.dtype).eps * weight.abs().max().float())
