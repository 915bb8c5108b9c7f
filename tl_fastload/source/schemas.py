"""The types of what stands in JSON files, checked once, before anybody calculates with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tl_fastload.errors import CheckpointError, LeanLoadError
from tl_fastload.source.json_files import short

_MOST = 2**31 - 1
_MOST_MODULES = 10_000


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        what: in words, as in "must be a text".
        fits: whether a value is one.
    """

    what: str
    fits: Callable[[Any], bool]

    def __or__(self, other: Rule) -> Rule:
        return Rule(f"{self.what} or {other.what}", lambda v: self.fits(v) or other.fits(v))


def _is_whole(value: Any, least: int = 1, most: int = _MOST) -> bool:
    return type(value) is int and least <= value <= most  # `type`: True is an int, too


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no bool."""
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        return is_one and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _all(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


NOTHING = Rule("null", lambda v: v is None)
TEXT = Rule("a text", lambda v: isinstance(v, str))
TEXTS = Rule("a list of texts", lambda v: _all(v, TEXT.fits))
FLAG = Rule("true or false", lambda v: isinstance(v, bool))
NUMBER = Rule("a finite number", is_number)
SIZE = Rule(f"a whole number from 1 to {_MOST:,}", _is_whole)
LENGTH = Rule(SIZE.what, lambda v: is_number(v) and v == int(v) and _is_whole(int(v)))
COUNT = Rule(
    f"a whole number from 1 to {_MOST_MODULES:,}", lambda v: _is_whole(v, 1, _MOST_MODULES)
)
OFFSET = Rule("a whole number from 0 on", lambda v: type(v) is int and v >= 0)
OFFSETS = Rule("a list of whole numbers from 0 on", lambda v: _all(v, OFFSET.fits))
TABLE = Rule("an object", lambda v: isinstance(v, dict))

NOT_NEGATIVE = Rule("a number from 0 on", lambda v: NUMBER.fits(v) and v >= 0)
FRACTION = Rule("a number above 0, and at most 1", lambda v: NUMBER.fits(v) and 0 < v <= 1)
WINDOW = Rule(
    "a whole number that fits a tensor", lambda v: is_number(v) and v == int(v) and abs(v) < 2**31
)
POSITIVE = Rule("a number above zero", lambda v: NUMBER.fits(v) and v > 0)
_BASES = ("rope_theta", "rope_local_base_freq", "rotary_emb_base", "factor")


def _is_rope(value: Any) -> bool:
    """Whether rotary settings, or those of each kind of layer, have bases with powers."""
    return TABLE.fits(value) and all(
        _is_rope(inner)
        if isinstance(inner, dict)
        else (name not in _BASES or POSITIVE.fits(inner))
        and (name != "partial_rotary_factor" or FRACTION.fits(inner))
        for name, inner in value.items()
        if inner is not None
    )


ROPE = Rule(
    f"an object whose {', '.join(_BASES)} are above zero, and whose partial_rotary_factor is at "
    "most 1",
    _is_rope,
)


def table_of(rule: Rule) -> Rule:
    """An object whose values fit a rule."""
    return Rule(
        f"an object in which each value is {rule.what}",
        lambda v: isinstance(v, dict) and all(map(rule.fits, v.values())),
    )


def check(
    fields: Mapping[str, Any],
    rules: Mapping[str, Rule],
    label: str,
    remedy: str,
    *,
    kind: type[LeanLoadError] = CheckpointError,
    required: bool = False,
) -> None:
    """Compare the fields of an object with their rules; a field without a rule may be anything.

    Args:
        fields: the object.
        rules: field -> what it must be.
        label: the file, and where in it, for the message.
        remedy: one sentence that says what to do.
        kind: of the error.
        required: whether each field that has a rule must be there.

    Raises:
        LeanLoadError: of that kind; names each field that does not fit.
    """
    problems = []
    for name, rule in rules.items():
        if name not in fields:
            problems += [f"{name} is missing"] if required else []
        elif not rule.fits(fields[name]):
            problems.append(f"{name} is {short(fields[name], 60)} and must be {rule.what}")
    if problems:
        raise kind(f"{label}: {'; '.join(problems[:10])}. {remedy}")


def _rules(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


MODEL: Mapping[str, Rule] = {
    **_rules("architectures", TEXT | TEXTS | NOTHING),
    **_rules("model_type", TEXT | NOTHING),
    **_rules("auto_map quantization_config text_config vision_config", TABLE | NOTHING),
    **_rules("rope_scaling rope_parameters", ROPE | NOTHING),
    **_rules("layer_types", TEXTS | NOTHING),
    **_rules(
        "hidden_size n_embd num_attention_heads n_head num_heads num_key_value_heads head_dim "
        "intermediate_size n_inner ffn_dim vocab_size n_positions n_ctx "
        "word_embed_proj_dim num_experts_per_tok seq_length",
        SIZE | NOTHING,
    ),
    # Some of transformers' own configurations have 1200.0.
    **_rules("max_position_embeddings", LENGTH | NOTHING),
    **_rules("num_hidden_layers n_layer num_layers num_local_experts num_experts", COUNT | NOTHING),
    **_rules(
        "initializer_range final_logit_softcapping attn_logit_softcapping query_pre_attn_scalar",
        NUMBER | NOTHING,
    ),
    **_rules("layer_norm_epsilon rms_norm_eps layer_norm_eps norm_epsilon", NOT_NEGATIVE | NOTHING),
    **_rules("rotary_pct partial_rotary_factor", FRACTION | NOTHING),
    **_rules("sliding_window window_size", WINDOW | NOTHING),
    **_rules(" ".join(_BASES), POSITIVE | NOTHING),
}
"""Fields of a `config.json` that are calculated with, at its top and in its `text_config`."""

TOY: Mapping[str, Rule] = {
    **_rules("d_model n_heads d_head n_ctx d_vocab d_mlp", SIZE | NOTHING),
    **_rules("n_layers", COUNT),
    **_rules("attn_only", FLAG | NOTHING),
    **_rules("act_fn normalization tokenizer_name dataset_name", TEXT | NOTHING),
    **_rules("ln_eps init_range initializer_range", NUMBER | NOTHING),
}
"""Fields of the `config.json` of TransformerLens' own toy models."""

ADAPTER: Mapping[str, Rule] = {
    **_rules("peft_type", TEXT),
    **_rules("r", SIZE | NOTHING),
    **_rules("lora_alpha", NUMBER | NOTHING),
    **_rules("lora_dropout", NUMBER | NOTHING),
    **_rules("rank_pattern", table_of(SIZE) | NOTHING),
    **_rules("alpha_pattern", table_of(NUMBER) | NOTHING),
    **_rules("target_modules exclude_modules", TEXT | TEXTS | NOTHING),
    **_rules("layers_pattern", TEXT | TEXTS | NOTHING),
    **_rules("target_parameters modules_to_save", TEXTS | NOTHING),
    **_rules("layers_to_transform", OFFSET | OFFSETS | NOTHING),
    **_rules("base_model_name_or_path revision task_type peft_version bias", TEXT | NOTHING),
    **_rules("fan_in_fan_out use_rslora use_dora lora_bias inference_mode", FLAG | NOTHING),
    **_rules("init_lora_weights", TEXT | FLAG | NOTHING),
}
"""Fields of an `adapter_config.json` of a LoRA."""
