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
from pathlib import Path
from typing import Any

import transformers
from transformer_lens import loading_from_pretrained as loading
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from tl_fastload.errors import CheckpointError, UnsupportedArchitectureError
from tl_fastload.ground.borrow import borrow
from tl_fastload.hooked.architectures import (
    SUPPORTED_ARCHITECTURES,
    architecture_of,
    declared_architectures,
    declared_quantization,
    supported_list,
    text_config,
    unsupported_json,
)
from tl_fastload.hooked.config_families import FAMILIES
from tl_fastload.hooked.config_repairs import (
    FIELD_DEFAULTS,
    refuse_unsupported,
    repair,
    settle_context,
)
from tl_fastload.hooked.config_rope import read_rope
from tl_fastload.source import schemas
from tl_fastload.source.json_files import read_object

__all__ = ["SUPPORTED_ARCHITECTURES", "architecture_of", "config_dict", "load_hf_config"]

# Their config and model classes are files of the checkpoint, which run only if asked for.
_CODE_IN_CHECKPOINT: dict[str, dict[str, Any]] = {
    # The defaults of the class, for keys that a config.json may leave out.
    "GPT2LMHeadCustomModel": {
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_pytorch_tanh",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    },
    "QWenLMHeadModel": {
        "layer_norm_epsilon": 1e-6,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "kv_channels": 128,
        "rotary_pct": 1.0,
        "rotary_emb_base": 10000,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "tie_word_embeddings": False,
    },
}
_CORRECT = "Correct the file, or download it again."
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


def load_hf_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """Read `folder/config.json`.

    trust_remote_code: whether a config class that comes with the checkpoint may run. It is asked
    for only where transformers has no class of its own; without it, the values of QWenLMHeadModel
    and GPT2LMHeadCustomModel (SantaCoder) are read as plain data.

    Raises CheckpointError when config.json is missing or invalid, UnsupportedArchitectureError when
    it describes a model that HookedTransformer cannot represent.
    """
    raw = read_config_json(folder)
    names = declared_architectures(raw.get("architectures"))
    in_checkpoint = next((name for name in names if name in _CODE_IN_CHECKPOINT), None)
    model_type = _model_type(raw)
    config: Any
    try:
        if trust_remote_code and "auto_map" in raw and (in_checkpoint or model_type is None):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        elif in_checkpoint:
            config = PretrainedConfig.from_dict({**_CODE_IN_CHECKPOINT[in_checkpoint], **raw})
        elif model_type is None:
            raise unsupported_json(folder, raw)
        elif raw.get("model_type") == model_type:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        else:
            config = CONFIG_MAPPING[model_type].from_dict({**raw, "model_type": model_type})
    except UnsupportedArchitectureError:
        raise
    except Exception as error:  # config classes raise anything for values they do not expect
        raise CheckpointError(
            f"{folder / 'config.json'} cannot be read as a {model_type or in_checkpoint} config: "
            f"{type(error).__name__}: {error}. Correct the file, or download it again."
        ) from error
    architecture_of(config)
    return config  # type: ignore[no-any-return]


def hf_config_of(values: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration whose `to_dict` gave these values, as far as transformers has a class for
    it; no code of a checkpoint runs.
    """
    model_type = _model_type(values)
    if model_type is None:
        return PretrainedConfig.from_dict(dict(values))
    config_class: Any = CONFIG_MAPPING[model_type]
    found: PretrainedConfig = config_class.from_dict({**values, "model_type": model_type})
    return found


def read_config_json(folder: Path) -> dict[str, Any]:
    """The object in `folder/config.json`, whose fields have the types that they must have.

    Raises:
        CheckpointError: it is missing, or no such object.
    """

    def cannot_read(error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{folder} has no readable config.json ({error.strerror or error}). A folder saved "
            "with Hugging Face's save_pretrained has one; copy it next to the weights."
        )

    path = folder / "config.json"
    remedy = "It may be a half-written download: fetch it again."
    raw = read_object(path, remedy, cannot_read=cannot_read)
    if is_toy(raw):
        schemas.check(raw, schemas.TOY, str(path), _CORRECT)
        return raw
    schemas.check(raw, schemas.MODEL, str(path), _CORRECT)
    if raw.get("text_config"):
        schemas.check(raw["text_config"], schemas.MODEL, f"{path}, text_config", _CORRECT)
    return raw


def is_toy(raw: Mapping[str, Any]) -> bool:
    """Whether the fields of a `config.json` are those of TransformerLens' own toy models."""
    return "d_model" in raw and "model_type" not in raw


def _model_type(raw: Mapping[str, Any]) -> str | None:
    """The model type that transformers has a config class for, or None."""
    declared = raw.get("model_type")
    if isinstance(declared, str) and declared in CONFIG_MAPPING:
        return declared
    for name in declared_architectures(raw.get("architectures")):
        if name in SUPPORTED_ARCHITECTURES and hasattr(transformers, name):
            # Several model types may name one class: the class says which is its own.
            return str(getattr(transformers, name).config_class.model_type)
    return None


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
    architecture = architecture_of(hf_config)
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
                f"The installed TransformerLens reads no config of a {architecture}. "
                f"{supported_list()}"
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
            "architectures": [architecture_of(config)],
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
