"""The configuration of a model as Hugging Face has it: `config.json`, read and checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from tl_fastload.errors import CheckpointError, UnsupportedArchitectureError
from tl_fastload.ground.hf_configs import declared_architectures
from tl_fastload.source import schemas
from tl_fastload.source.json_files import read_object

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


@dataclass(frozen=True)
class Supported:
    """Which model classes can be loaded, and what to say of the others.

    Attributes:
        names: of transformers' causal language model classes.
        why_not: the rest of a sentence that begins with the name of a class, from that name, the
            model type, and whether it is an encoder-decoder.
        own_format: whether a model is in a format of the library's own, which no class of
            transformers' describes, from its official name and the fields of its `config.json`.
    """

    names: tuple[str, ...]
    why_not: Callable[[str, str, bool], str]
    own_format: Callable[[str | None, Mapping[str, Any]], bool] = lambda official, raw: False

    def error(
        self, name: str, model_type: str, is_seq2seq: bool = False
    ) -> UnsupportedArchitectureError:
        """The error for a model class, or for a model type without one."""
        what = name or f"A config of model type {model_type!r} without `architectures`"
        reason = self.why_not(name, model_type, is_seq2seq)
        return UnsupportedArchitectureError(f"{what} {reason} {self}")

    def __str__(self) -> str:
        return f"Supported: {', '.join(self.names)}."


def architecture_of(hf_config: Any, supported: Supported) -> str:
    """The name of the causal language model class that `hf_config` describes.

    A config of a base model (`GPT2Model`), or one without `architectures`, is taken for the
    language model of its model type.

    Raises UnsupportedArchitectureError when that class is none of those supported.
    """
    found = causal_class_of(hf_config, supported.names)
    if found is not None:
        return found
    names = declared_architectures(getattr(hf_config, "architectures", None))
    model_type = str(getattr(hf_config, "model_type", "") or "")
    is_seq2seq = bool(getattr(hf_config, "is_encoder_decoder", False))
    raise supported.error(names[0] if names else "", model_type, is_seq2seq)


def read_config(
    folder: Path,
    supported: Supported,
    *,
    trust_remote_code: bool,
    raw: Mapping[str, Any] | None = None,
    file: str = "config.json",
) -> PretrainedConfig:
    """The configuration in a folder, of a model that is supported.

    folder: has the `config.json`.
    supported: its names of classes say the model type where config.json does not.
    trust_remote_code: whether a config class that comes with the checkpoint may run. It is asked
        for only where transformers has no class of its own; without it, the values of
        QWenLMHeadModel and GPT2LMHeadCustomModel (SantaCoder) are read as plain data.
    raw: what `read_config_json` found, if it was read already.
    file: in that folder, that says so: a GGUF file does, too.

    Raises CheckpointError when config.json is missing or invalid, UnsupportedArchitectureError when
    it describes a model that is not supported.
    """
    raw = read_config_json(folder) if raw is None else raw
    names = declared_architectures(raw.get("architectures"))
    in_checkpoint = next((name for name in names if name in _CODE_IN_CHECKPOINT), None)
    model_type = _model_type(raw, supported.names)
    runs_code = trust_remote_code and "auto_map" in raw and (in_checkpoint or model_type is None)
    if not (runs_code or in_checkpoint or model_type):
        raise _unknown(folder, raw, supported)
    config: Any
    try:
        if runs_code or _is_read_otherwise(raw):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=bool(runs_code))
        elif in_checkpoint:
            config = PretrainedConfig.from_dict({**_CODE_IN_CHECKPOINT[in_checkpoint], **raw})
        else:
            values = _with_special_floats(copy.deepcopy({**raw, "model_type": model_type}))
            config = CONFIG_MAPPING[str(model_type)].from_dict(values, name_or_path=folder)
    except Exception as error:  # config classes raise anything for values they do not expect
        raise CheckpointError(
            f"{folder / file} cannot be read as a {model_type or in_checkpoint} config: "
            f"{type(error).__name__}: {error}. Correct the file, or download it again."
        ) from error
    architecture_of(config, supported)
    return config  # type: ignore[no-any-return]


def _with_special_floats(values: dict[str, Any]) -> dict[str, Any]:
    """Fields with the numbers that JSON lacks, for which transformers 5 writes an object."""
    decode: Any = getattr(PretrainedConfig, "_decode_special_floats", lambda fields: fields)
    found: dict[str, Any] = decode(values)
    return found


def _is_read_otherwise(raw: Mapping[str, Any]) -> bool:
    """Whether transformers takes another file, or another class, than these fields say."""
    is_windowed = raw.get("model_type") == "mistral" and "layer_types" in raw
    return "model_type" in raw and ("configuration_files" in raw or is_windowed)


def _unknown(
    folder: Path, raw: Mapping[str, Any], supported: Supported
) -> UnsupportedArchitectureError:
    """The error for a config.json of a model type that transformers does not know."""
    names = declared_architectures(raw.get("architectures"))
    if names:
        return supported.error(names[0], str(raw.get("model_type", "")))
    return UnsupportedArchitectureError(
        f"{folder / 'config.json'} names neither `architectures` nor a `model_type` that "
        f"transformers knows (model_type: {raw.get('model_type')!r}), so it does not say what "
        f'model this is. Add `architectures`, for instance ["LlamaForCausalLM"]. {supported}'
    )


def hf_config_of(values: Mapping[str, Any], known: Collection[str]) -> PretrainedConfig:
    """The configuration whose `to_dict` gave these values, as far as transformers has a class for
    it; no code of a checkpoint runs. `known` is as for `read_config`.
    """
    model_type = _model_type(values, known)
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


def _model_type(raw: Mapping[str, Any], known: Collection[str]) -> str | None:
    """The model type that transformers has a config class for, or None."""
    declared = raw.get("model_type")
    if isinstance(declared, str) and declared in CONFIG_MAPPING:
        return declared
    for name in declared_architectures(raw.get("architectures")):
        if name in known and hasattr(transformers, name):
            # Several model types may name one class: the class says which is its own.
            return str(getattr(transformers, name).config_class.model_type)
    return None


def causal_class_of(hf_config: Any, known: Collection[str]) -> str | None:
    """The name of the causal language model class that `hf_config` describes, of those known.

    A config of a base model (`GPT2Model`), or one without `architectures`, is taken for the
    language model of its model type.
    """
    names = declared_architectures(getattr(hf_config, "architectures", None))
    model_type = str(getattr(hf_config, "model_type", "") or "")
    by_lower = {name.lower(): name for name in known}
    for name in names:
        if name.lower() in by_lower:  # early Llama checkpoints say "LLaMAForCausalLM"
            return by_lower[name.lower()]
    name = names[0] if names else ""
    base = MODEL_MAPPING_NAMES.get(model_type, "")
    if not names or name == base or (isinstance(base, tuple) and name in base):
        causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
        if causal in known:
            return str(causal)
    return None
