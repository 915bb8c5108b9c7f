"""Rotary embeddings: from a Hugging Face config into the fields of HookedTransformerConfig."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tl_fastload.errors import UnsupportedArchitectureError

_FULL, _SLIDING = "full_attention", "sliding_attention"
# Families whose scaling has always been meant for the full-attention layers alone.
_SCALES_FULL_LAYERS_ONLY = ("gemma3_text", "olmo3")
# Frequencies that no scaling changes, for `dynamic` as long as inputs are not longer than the
# context of pre-training.
_PLAIN = ("default", "dynamic")
# Scalings that change frequencies and nothing else.
_KINDS = ("linear", "llama3", "yarn", "longrope")


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


def rope_fields(pair: RopePair, context: RopeContext) -> tuple[dict[str, Any], bool]:
    """Fields of HookedTransformerConfig for `pair`, and whether the model's own rotary tables
    are to be transformers' (`rope_tables`), as no fields say what transformers computes.
    """
    full = pair.full if context.has_full else pair.sliding
    fields: dict[str, Any] = {"rotary_base": full.base}
    global_only = False
    if context.has_full and context.has_sliding:
        if pair.sliding.base != full.base:
            fields["rotary_base_local"] = pair.sliding.base
        global_only = (pair.sliding.kind, pair.sliding.scaling) != (full.kind, full.scaling)
        if global_only and pair.sliding.kind not in _PLAIN:
            return fields, True
    scaled = _scaling(full, context, global_only)
    if scaled is None or set(scaled) - context.fields:
        return fields, True
    if fields.keys() - context.fields:  # no other base for sliding windows
        return {"rotary_base": full.base}, True
    return {**fields, **scaled}, False


def _scaling(rope: Rope, context: RopeContext, global_only: bool) -> dict[str, Any] | None:
    """Fields for one scaling; None where there are none that say it."""
    if rope.kind in _PLAIN:
        return {}
    if rope.kind == "linear":
        return _linear(float(rope.params["factor"]), context, global_only)
    if rope.kind == "llama3":
        return None if global_only else _llama3(rope, context)
    if rope.kind == "yarn":
        extra = {"yarn_global_attn_only": True} if global_only else {}
        return {**_yarn(rope, context), **extra}
    return None


def _linear(factor: float, context: RopeContext, global_only: bool) -> dict[str, Any] | None:
    if factor == 1.0:
        return {}
    if "rotary_scaling_factor" in context.fields and (global_only or not context.has_sliding):
        return {"rotary_scaling_factor": factor}
    if global_only:
        return None
    # NTK-by-parts divides by `factor` every frequency whose wavelength exceeds the original
    # context. With an original context of 1 these are all of them, which is linear scaling.
    return {
        "use_NTK_by_parts_rope": True,
        "NTK_original_ctx_len": 1,
        "NTK_by_parts_low_freq_factor": 1.0,
        "NTK_by_parts_high_freq_factor": 4.0,
        "NTK_by_parts_factor": factor,
    }


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


def refuse_unknown(ropes: list[Rope]) -> None:
    """Raise UnsupportedArchitectureError for a scaling whose frequencies nobody here computes."""
    for rope in ropes:
        if rope.kind not in _PLAIN and (rope.kind not in _KINDS or rope.kind not in functions()):
            raise UnsupportedArchitectureError(
                f"This model has the rotary scaling {rope.kind!r}, which neither HookedTransformer "
                "nor the installed transformers computes for it. Load it with transformers instead."
            )


def functions() -> Mapping[str, Any]:
    """transformers' functions: kind of rotary scaling -> frequencies."""
    try:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    except ImportError:  # came with transformers 4.43
        return {}
    return ROPE_INIT_FUNCTIONS
