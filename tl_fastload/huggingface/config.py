"""The configuration of a model as Hugging Face has it: `config.json`, read and checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from tl_fastload.errors import CheckpointError
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


def read_config(
    folder: Path, known: Collection[str], *, trust_remote_code: bool
) -> PretrainedConfig | None:
    """Read `folder/config.json`.

    known: names of transformers' classes that say the model type where config.json does not.
    trust_remote_code: whether a config class that comes with the checkpoint may run. It is asked
    for only where transformers has no class of its own; without it, the values of QWenLMHeadModel
    and GPT2LMHeadCustomModel (SantaCoder) are read as plain data.

    Returns None for a model type that transformers does not know.

    Raises CheckpointError when config.json is missing or invalid.
    """
    raw = read_config_json(folder)
    names = declared_architectures(raw.get("architectures"))
    in_checkpoint = next((name for name in names if name in _CODE_IN_CHECKPOINT), None)
    model_type = _model_type(raw, known)
    config: Any
    try:
        if trust_remote_code and "auto_map" in raw and (in_checkpoint or model_type is None):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        elif in_checkpoint:
            config = PretrainedConfig.from_dict({**_CODE_IN_CHECKPOINT[in_checkpoint], **raw})
        elif model_type is None:
            return None
        elif raw.get("model_type") == model_type:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        else:
            config = CONFIG_MAPPING[model_type].from_dict({**raw, "model_type": model_type})
    except Exception as error:  # config classes raise anything for values they do not expect
        raise CheckpointError(
            f"{folder / 'config.json'} cannot be read as a {model_type or in_checkpoint} config: "
            f"{type(error).__name__}: {error}. Correct the file, or download it again."
        ) from error
    return config  # type: ignore[no-any-return]


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
