"""Which architectures are accepted, and what the errors say of the others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tl_fastload.errors import CheckpointError, LeanLoadError, UnsupportedArchitectureError
from tl_fastload.ground.compat import TRANSFORMERS
from tl_fastload.hooked.architectures import SUPPORTED
from tl_fastload.huggingface.config import architecture_of, read_config


def _write(folder: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_text(text)
    return folder


def _architecture(folder: Path, **raw: Any) -> str:
    config = read_config(_write(folder, raw), SUPPORTED, trust_remote_code=False)
    return architecture_of(config, SUPPORTED)


@pytest.mark.parametrize(
    ("raw", "architecture"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2Model"]}, "GPT2LMHeadModel"),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, "LlamaForCausalLM"),
        ({"model_type": "gemma2", "architectures": None}, "Gemma2ForCausalLM"),
        ({"model_type": "gpt_neox"}, "GPTNeoXForCausalLM"),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"model_type": "llama", "architectures": ["LLaMAForCausalLM"]}, "LlamaForCausalLM"),
        ({"model_type": "opt", "architectures": "OPTForCausalLM"}, "OPTForCausalLM"),
        ({"model_type": "other", "architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
    ],
)
def test_the_language_model_is_inferred(
    raw: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    assert _architecture(tmp_path, **raw) == architecture


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "Bert.*is HookedEncoder"),
        ({"model_type": "bert"}, "model type 'bert'.*is HookedEncoder"),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "T5ForConditionalGeneration.*is HookedEncoderDecoder",
        ),
        (
            {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]},
            "Bart.*encoder-decoder .*serves T5 only",
        ),
        (
            {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]},
            "Roberta.*encoder .*serves BERT only",
        ),
        ({"model_type": "hubert", "architectures": ["HubertModel"]}, "is HookedAudioEncoder"),
        (
            {"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForPreTraining"]},
            "is HookedAudioEncoder",
        ),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "not the language model of its family, which is LlamaForCausalLM",
        ),
        (
            {"model_type": "other", "architectures": ["LlamaForCausalLm2"]},
            "The nearest that it can: LlamaForCausalLM",
        ),
        (
            {"model_type": "falcon", "architectures": ["FalconForCausalLM"]},
            r"FalconForCausalLM is not an architecture.*represent\. Supported:",
        ),
        (
            {"model_type": "unheard", "architectures": ["UnheardModel"]},
            "UnheardModel is not an architecture",
        ),
        ({}, "names neither `architectures` nor a `model_type`"),
    ],
)
def test_other_models_are_refused_with_the_reason(
    raw: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=words) as error:
        _architecture(tmp_path, **raw)
    assert "GPT2LMHeadModel, " in str(error.value)


def test_a_name_that_only_a_newer_transformer_lens_serves() -> None:
    class Config:
        architectures = ("Olmo3ForCausalLM",)

    older = tuple(name for name in SUPPORTED.names if name != "Olmo3ForCausalLM")
    with pytest.raises(UnsupportedArchitectureError, match="needs a newer TransformerLens"):
        architecture_of(Config(), replace(SUPPORTED, names=older))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"model_type": ', "not valid JSON.*fetch it again"),
        ("[1, 2]", "holds a list, not a JSON object"),
    ],
)
def test_a_damaged_config_is_named(content: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words) as error:
        read_config(_write(tmp_path, content), SUPPORTED, trust_remote_code=False)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.skipif(Version("5.0") > TRANSFORMERS, reason="transformers 5 checks values")
@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "unheard", "rope_scaling": {"rope_type": "yarn"}},
        {"hidden_size": 30, "num_attention_heads": 4},
    ],
)
def test_a_value_that_transformers_refuses_is_an_error_of_ours(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    raw = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **changes}
    with pytest.raises(CheckpointError, match="cannot be read as a llama config") as error:
        read_config(_write(tmp_path, raw), SUPPORTED, trust_remote_code=False)
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no readable config\.json") as error:
        read_config(tmp_path, SUPPORTED, trust_remote_code=False)
    assert str(tmp_path) in str(error.value)


def test_an_unknown_model_with_code_is_refused_without_running_it(tmp_path: Path) -> None:
    marker = tmp_path / "the code ran"
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    raw = {"model_type": "own", "architectures": ["Own"], "auto_map": {"AutoConfig": "code.C"}}
    with pytest.raises(LeanLoadError):
        read_config(_write(tmp_path, raw), SUPPORTED, trust_remote_code=False)
    assert not marker.exists()
