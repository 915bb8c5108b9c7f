"""Rotary embeddings: from a Hugging Face config into the fields of HookedTransformerConfig."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_FULL, _SLIDING = "full_attention", "sliding_attention"
# Families whose scaling has always been meant for the full-attention layers alone.
_SCALES_FULL_LAYERS_ONLY = ("gemma3_text", "olmo3")


@dataclass(frozen=True)
class Rope:
    """One rotary embedding: its kind (`default`, `linear`, `yarn` ...), base and parameters."""

    kind: str
    base: float
    partial: float
    params: Mapping[str, Any]

    @property
    def scaling(self) -> dict[str, Any]:
        """The parameters that scale frequencies, without base, kind and rotated fraction."""
        plain = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
        return {key: value for key, value in self.params.items() if key not in plain}


@dataclass(frozen=True)
class RopePair:
    """The rotary embedding of full-attention layers and that of sliding-window layers."""

    full: Rope
    sliding: Rope


def read_rope(hf_config: Any) -> RopePair:
    """Read the rotary parameters in the notation of transformers 5 (`rope_parameters`) or older."""
    parameters = getattr(hf_config, "rope_parameters", None)
    if isinstance(parameters, Mapping) and (_FULL in parameters or _SLIDING in parameters):
        full = _rope(hf_config, parameters.get(_FULL) or parameters.get(_SLIDING) or {})
        return RopePair(full, _rope(hf_config, parameters.get(_SLIDING) or full.params))
    if isinstance(parameters, Mapping):
        rope = _rope(hf_config, parameters)
        return RopePair(rope, rope)
    full = _rope(hf_config, getattr(hf_config, "rope_scaling", None) or {})
    local_base = getattr(hf_config, "rope_local_base_freq", None)
    if local_base is not None or getattr(hf_config, "model_type", "") in _SCALES_FULL_LAYERS_ONLY:
        base = full.base if local_base is None else float(local_base)
        return RopePair(full, Rope("default", base, full.partial, {}))
    return RopePair(full, full)


def _rope(hf_config: Any, params: Mapping[str, Any]) -> Rope:
    kind = str(params.get("rope_type") or params.get("type") or "default").lower()
    base = params.get("rope_theta")
    for legacy in ("rope_theta", "rotary_emb_base"):
        base = getattr(hf_config, legacy, None) if base is None else base
    partial = params.get("partial_rotary_factor")
    for legacy in ("partial_rotary_factor", "rotary_pct"):
        partial = getattr(hf_config, legacy, None) if partial is None else partial
    return Rope(
        "longrope" if kind == "su" else kind,
        10000.0 if base is None else base,
        1.0 if partial is None else float(partial),
        params,
    )


@dataclass(frozen=True)
class RopeContext:
    """What the translation of a rotary embedding depends on besides its own parameters.

    max_positions: the config's `max_position_embeddings`.
    has_sliding, has_full: which kinds of layer the model has.
    original_positions: the config's own `original_max_position_embeddings` (Phi-3), else None.
    fields: names that the installed HookedTransformerConfig has.
    """

    max_positions: int
    has_sliding: bool
    has_full: bool
    original_positions: int | None
    fields: frozenset[str]

    def original(self, rope: Rope) -> int:
        """Positions of pre-training, before the context was extended."""
        value = self.original_positions or rope.params.get("original_max_position_embeddings")
        return int(value or self.max_positions)


def rope_fields(pair: RopePair, context: RopeContext) -> tuple[dict[str, Any], list[str]]:
    """Fields of HookedTransformerConfig for `pair`, and notes on what they cannot compute."""
    full = pair.full if context.has_full else pair.sliding
    fields: dict[str, Any] = {"rotary_base": full.base}
    global_only = False
    notes: list[str] = []
    if context.has_full and context.has_sliding:
        if pair.sliding.base != full.base:
            fields["rotary_base_local"] = pair.sliding.base
        same = (pair.sliding.kind, pair.sliding.scaling) == (full.kind, full.scaling)
        global_only = not same
        if not same and pair.sliding.kind != "default":
            notes.append(_differs(pair.sliding, "on sliding-window layers", 1))
    scaled, problem = _scaling(full, context, global_only)
    first = _first_difference(full, context)
    unknown = sorted(set(scaled) - context.fields)
    if unknown:
        scaled, first, problem = {}, 1, f"this TransformerLens has no {', '.join(unknown)}"
    if problem:
        notes.append(_differs(full, problem, first))
    return {**fields, **scaled}, notes


def _first_difference(rope: Rope, context: RopeContext) -> int:
    if rope.kind == "dynamic":
        return context.max_positions
    if rope.kind == "longrope" and _uniform_short_factor(rope) is not None:
        return context.original(rope)
    return 1


def _differs(rope: Rope, why: str, position: int) -> str:
    where = f"for inputs of more than {position} tokens" if position > 1 else "from position 1 on"
    return (
        f"HookedTransformer cannot compute this model's {rope.kind!r} rotary scaling ({why}): "
        f"results differ from Hugging Face's {where}."
    )


def _scaling(rope: Rope, context: RopeContext, global_only: bool) -> tuple[dict[str, Any], str]:
    """Fields for one scaling, and what they leave out (an empty text: nothing)."""
    if rope.kind == "default":
        return {}, ""
    if rope.kind == "linear":
        return _linear(float(rope.params["factor"]), context, global_only)
    if rope.kind == "llama3":
        return ({}, "not on some layers only") if global_only else (_llama3(rope, context), "")
    if rope.kind == "yarn":
        extra = {"yarn_global_attn_only": True} if global_only else {}
        return {**_yarn(rope, context), **extra}, ""
    if rope.kind == "longrope":
        return _longrope(rope, context, global_only)
    if rope.kind == "dynamic":
        return {}, "its frequencies depend on the length of the input"
    return {}, "unknown kind"


def _linear(factor: float, context: RopeContext, global_only: bool) -> tuple[dict[str, Any], str]:
    if factor == 1.0:
        return {}, ""
    if "rotary_scaling_factor" in context.fields and (global_only or not context.has_sliding):
        return {"rotary_scaling_factor": factor}, ""
    if global_only:
        return {}, "not on some layers only"
    # NTK-by-parts divides by `factor` every frequency whose wavelength exceeds the original
    # context. With an original context of 1 these are all of them, which is linear scaling.
    return {
        "use_NTK_by_parts_rope": True,
        "NTK_original_ctx_len": 1,
        "NTK_by_parts_low_freq_factor": 1.0,
        "NTK_by_parts_high_freq_factor": 4.0,
        "NTK_by_parts_factor": factor,
    }, ""


def _llama3(rope: Rope, context: RopeContext) -> dict[str, Any]:
    return {
        "use_NTK_by_parts_rope": True,
        "NTK_original_ctx_len": context.original(rope),
        "NTK_by_parts_low_freq_factor": rope.params.get("low_freq_factor", 1.0),
        "NTK_by_parts_high_freq_factor": rope.params.get("high_freq_factor", 4.0),
        "NTK_by_parts_factor": rope.params.get("factor", 1.0),
    }


def _yarn(rope: Rope, context: RopeContext) -> dict[str, Any]:
    original = context.original(rope)
    factor = rope.params.get("factor") or context.max_positions / original
    attention_factor = rope.params.get("attention_factor")
    if attention_factor is None:
        numerator, denominator = rope.params.get("mscale"), rope.params.get("mscale_all_dim")
        if numerator and denominator:
            attention_factor = _mscale(factor, numerator) / _mscale(factor, denominator)
        else:
            attention_factor = _mscale(factor, 1.0)
    truncate = rope.params.get("truncate")
    return {
        "use_yarn_rope": True,
        "yarn_factor": float(factor),
        "yarn_attention_factor": float(attention_factor),
        "yarn_beta_fast": float(rope.params.get("beta_fast") or 32.0),
        "yarn_beta_slow": float(rope.params.get("beta_slow") or 1.0),
        "yarn_original_max_position_embeddings": original,
        "yarn_truncate": True if truncate is None else bool(truncate),
    }


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _uniform_short_factor(rope: Rope) -> float | None:
    """The one factor of all frequencies in short inputs, or None where they differ."""
    factors = {float(value) for value in rope.params.get("short_factor") or (1.0,)}
    return factors.pop() if len(factors) == 1 else None


def _longrope(rope: Rope, context: RopeContext, global_only: bool) -> tuple[dict[str, Any], str]:
    original = context.original(rope)
    factor = rope.params.get("factor") or context.max_positions / original
    attention_factor = rope.params.get("attention_factor")
    if attention_factor is None:
        attention_factor = (
            math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
        )
    short = _uniform_short_factor(rope)
    if short is None or (short != 1.0 and attention_factor != 1.0) or global_only:
        return {}, "one factor per frequency"
    problem = "other factors for longer inputs" if context.max_positions > original else ""
    if attention_factor == 1.0:
        return _linear(short, context, global_only)[0], problem
    # YaRN with a factor of 1 leaves the frequencies alone and only scales sine and cosine.
    return {
        "use_yarn_rope": True,
        "yarn_factor": 1.0,
        "yarn_attention_factor": float(attention_factor),
        "yarn_original_max_position_embeddings": original,
    }, problem
