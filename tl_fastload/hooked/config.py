"""The configuration of a HookedTransformer, from a Hugging Face config and nothing else.

TransformerLens decides by the *name* of a model which branch of its configuration code runs. Here
its code runs under a neutral name, so that it reads the config of any folder, hub name or model in
memory; families that it has under official names only are filled in by `config_families`, and what
its reading leaves out is put right by `config_repairs`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from transformer_lens import loading_from_pretrained as loading

from tl_fastload.errors import CheckpointError, UnsupportedArchitectureError
from tl_fastload.ground.borrow import borrow
from tl_fastload.ground.hf_configs import declared_quantization, text_config
from tl_fastload.hooked.architectures import SUPPORTED
from tl_fastload.hooked.config_families import FAMILIES
from tl_fastload.hooked.config_repairs import (
    FIELD_DEFAULTS,
    refuse_unsupported,
    repair,
    settle_context,
)
from tl_fastload.hooked.config_rope import read_rope
from tl_fastload.huggingface.config import architecture_of

_NEUTRAL_NAME = "checkpoint"
_SHAPE_FIELDS = (
    "d_model",
    "d_head",
    "n_heads",
    "n_key_value_heads",
    "d_mlp",
    "n_layers",
    "d_vocab",
    "num_experts",
)
# Fields in which TransformerLens may differ from config.json without computing other numbers.
_FREE_FIELDS = frozenset(
    {
        "default_prepend_bos",
        "dtype",
        "initializer_range",
        "n_ctx",
        "original_architecture",
        "quantization_method",
        "tie_word_embeddings",
        "tokenizer_name",
        "tokenizer_prepends_bos",
        "trust_remote_code",
    }
)


def config_dict(
    hf_config: Any,
    *,
    official_name: str | None,
    tokenizer_name: str | None,
    trust_remote_code: bool,
) -> tuple[dict[str, Any], list[str]]:
    """Return what TransformerLens' `convert_hf_model_config` would, from `hf_config` alone.

    hf_config: a transformers config; never changed.
    official_name: TransformerLens' official name of the model, if it has one. Its own table for
        that name is then used wherever it describes this checkpoint and computes its numbers.
    tokenizer_name: goes into the dictionary.
    trust_remote_code: as passed to TransformerLens, whose dictionary records it.

    Returns the dictionary and notes for the load report.

    Raises UnsupportedArchitectureError, and CheckpointError when a value is missing or wrong.
    """
    architecture = architecture_of(hf_config, SUPPORTED)
    text = text_config(hf_config)
    refuse_unsupported(text, architecture)
    try:
        fields = _read_fields(hf_config, text, architecture, trust_remote_code)
        repair(fields, text, architecture)
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"The config of this {architecture} lacks a value that the model needs, or has an "
            f"impossible one: {error}. Correct config.json."
        ) from error
    notes: list[str] = []
    if official_name is not None:
        official = _stock_fields(hf_config, official_name, trust_remote_code)
        if official is not None:
            fields, notes = _merge_official(official, fields, official_name)
    notes += settle_context(fields, text)
    fields["tokenizer_name"] = tokenizer_name
    known = {name: value for name, value in fields.items() if name in FIELD_DEFAULTS}
    return copy.deepcopy(known), notes


def _read_fields(
    hf_config: Any, text: Any, architecture: str, trust_remote_code: bool
) -> dict[str, Any]:
    if architecture not in FAMILIES:
        fields = _stock_fields(hf_config, _NEUTRAL_NAME, trust_remote_code)
        if fields is None:
            raise UnsupportedArchitectureError(
                f"The installed TransformerLens reads no config of a {architecture}. {SUPPORTED}"
            )
        return fields
    fields = FAMILIES[architecture](text)
    fields["original_architecture"] = architecture
    quantization = declared_quantization(hf_config) or {}
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, Mapping)
        else getattr(quantization, "quant_method", None)
    )
    fields["quantization_method"] = getattr(method, "value", method)
    if trust_remote_code:
        fields["trust_remote_code"] = True
    return fields


class _LegacyView:
    """A config as TransformerLens expects it: read-only, with names that transformers dropped."""

    def __init__(self, config: Any) -> None:
        self._config = config
        rope = read_rope(config).full
        heads = getattr(config, "num_attention_heads", None)
        self._legacy = {
            "architectures": [architecture_of(config, SUPPORTED)],
            "n_ctx": getattr(config, "max_position_embeddings", None)
            or getattr(config, "n_positions", None),
            "rope_theta": rope.base,
            "rope_scaling": None if rope.kind == "default" else dict(rope.params),
            "rotary_pct": rope.partial,
            "partial_rotary_factor": rope.partial,
        }
        if heads and not getattr(config, "head_dim", None):
            self._legacy["head_dim"] = config.hidden_size // heads

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        legacy = self.__dict__["_legacy"]
        return legacy[name] if name in legacy else getattr(self.__dict__["_config"], name)


def _stock_fields(hf_config: Any, name: str, trust_remote_code: bool) -> dict[str, Any] | None:
    """What TransformerLens' own code says for `name`, or None where it has no branch for it."""
    view = _LegacyView(hf_config)

    class Loaded:
        @staticmethod
        def from_pretrained(*_args: Any, **_kwargs: Any) -> _LegacyView:
            return view

    convert = borrow(
        loading.convert_hf_model_config,
        label=f"{loading.__name__}.convert_hf_model_config",
        needs=("AutoConfig", "get_official_model_name"),
        AutoConfig=Loaded,
        get_official_model_name=lambda given: given,
    )
    asked = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        return dict(convert(name, **asked))
    except NotImplementedError:
        return None


def _merge_official(
    official: dict[str, Any], fields: dict[str, Any], name: str
) -> tuple[dict[str, Any], list[str]]:
    """TransformerLens' table for an official name, unless it describes another checkpoint.

    Fields that change what is computed follow config.json, and a note names them.
    """
    shapes = [key for key in _SHAPE_FIELDS if _value(official, key) != _value(fields, key)]
    if shapes:
        listed = ", ".join(f"{key} {official.get(key)} -> {fields.get(key)}" for key in shapes)
        return fields, [f"config.json differs from TransformerLens' table for {name}: {listed}."]
    merged, notes = dict(official), []
    for key in sorted((fields.keys() | official.keys()) - _FREE_FIELDS - set(_SHAPE_FIELDS)):
        ours, theirs = _value(fields, key), _value(official, key)
        if not _equal(ours, theirs):
            merged[key] = ours
            notes.append(
                f"{key} is {ours} as in config.json; TransformerLens' table for {name} has "
                f"{theirs}, which computes other numbers than Hugging Face."
            )
    for key in ("quantization_method", "original_architecture"):
        merged[key] = fields.get(key)
    return merged, notes


def _value(fields: Mapping[str, Any], key: str) -> Any:
    """A field as HookedTransformerConfig completes it."""
    value = fields.get(key, FIELD_DEFAULTS.get(key))
    if key == "n_key_value_heads":
        return value or fields["n_heads"]
    if key == "rotary_dim" and fields.get("positional_embedding_type") == "rotary":
        return value or fields["d_head"]
    if key == "attn_scale" and value == -1.0:
        return math.sqrt(fields["d_head"])
    if key in ("attn_types", "window_size") and not fields.get("use_local_attn"):
        return None
    return value


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, (int, float)):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return bool(ours == theirs)
