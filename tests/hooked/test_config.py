"""Configurations from config.json: equal to TransformerLens' own where it can read them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from packaging.version import Version
from transformer_lens import loading_from_pretrained as loading
from transformers import AutoConfig

from tests.support.tiny_configs import (
    ARCHITECTURES,
    AVAILABLE,
    complete,
    largest_difference,
    make_config,
    save_config,
    translate,
)
from tl_fastload.errors import CheckpointError
from tl_fastload.ground.borrow import borrow
from tl_fastload.ground.compat import TRANSFORMER_LENS
from tl_fastload.hooked.architectures import SUPPORTED, SUPPORTED_ARCHITECTURES
from tl_fastload.hooked.config import config_dict
from tl_fastload.hooked.config_families import FAMILIES
from tl_fastload.huggingface.config import read_config

_ONLY_UNDER_THE_LOADERS_NAME = ("model_name", "tokenizer_name", "default_prepend_bos")
_CURRENT = pytest.mark.skipif(
    Version("3.0") > TRANSFORMER_LENS, reason="compares with the tables of TransformerLens 3"
)


def _comparable(cfg: Any) -> dict[str, Any]:
    skipped = _ONLY_UNDER_THE_LOADERS_NAME
    return {name: value for name, value in vars(cfg).items() if name not in skipped}


@_CURRENT
@pytest.mark.parametrize("architecture", sorted(set(AVAILABLE) - {*FAMILIES, "PhiForCausalLM"}))
def test_equals_what_stock_reads_from_a_neutral_folder(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stock cannot read a GPT-2 without this key, which transformers no longer writes.
    raw = {"n_ctx": 64} if architecture == "GPT2LMHeadModel" else {}
    save_config(make_config(architecture), tmp_path / "checkpoint", **raw)
    monkeypatch.chdir(tmp_path)  # stock decides by the path, which here is only "checkpoint"
    stock = loading.get_pretrained_model_config("checkpoint", device="cpu")
    fields, notes = translate(read_config(Path("checkpoint"), SUPPORTED, trust_remote_code=False))
    assert _comparable(complete(fields)) == _comparable(stock)
    assert not notes


@_CURRENT
def test_equals_what_stock_reads_from_a_phi_of_transformers_4() -> None:
    config = make_config("PhiForCausalLM")
    fields, _ = translate(config)
    config.partial_rotary_factor = 0.25  # where stock looks for it
    assert _comparable(complete(fields)) == _comparable(
        complete(_stock_table("checkpoint", config))
    )


@pytest.mark.parametrize("architecture", AVAILABLE)
def test_computes_what_hugging_face_computes(architecture: str) -> None:
    assert largest_difference(make_config(architecture)) < 1e-4


def test_every_supported_architecture_is_covered() -> None:
    in_other_tests = {
        "QWenLMHeadModel",
        "GPT2LMHeadCustomModel",
        "Gemma3ForConditionalGeneration",
    }
    assert set(SUPPORTED_ARCHITECTURES) <= set(ARCHITECTURES) | in_other_tests


@pytest.mark.parametrize("word", ["llama", "gemma-3-4b", "gemma-2-2b", "phi", "t5", "bert"])
@pytest.mark.parametrize("architecture", ["GPTNeoXForCausalLM", "GPT2LMHeadModel"])
def test_the_name_of_the_folder_decides_nothing(
    architecture: str, word: str, tmp_path: Path
) -> None:
    config = make_config(architecture)
    folder = save_config(config, tmp_path / f"my-{word}-model")
    assert translate(read_config(folder, SUPPORTED, trust_remote_code=False)) == translate(config)


def test_the_model_type_is_not_guessed_from_the_path(tmp_path: Path) -> None:
    folder = save_config(make_config("LlamaForCausalLM"), tmp_path / "gpt2-bert", model_type=None)
    assert read_config(folder, SUPPORTED, trust_remote_code=False).model_type == "llama"


@pytest.mark.parametrize("architecture", AVAILABLE)
def test_the_callers_config_stays_as_it_is(architecture: str) -> None:
    config = make_config(architecture)
    before = copy.deepcopy(vars(config))
    fields, _ = translate(config)
    for value in fields.values():
        if isinstance(value, list):
            value.append("written by the caller")
    assert vars(config) == before


def test_arguments_of_the_caller_are_recorded() -> None:
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    for architecture in ("LlamaForCausalLM", "GemmaForCausalLM"):
        config = make_config(architecture, quantization_config=quantization)
        fields, _ = config_dict(
            config, official_name=None, tokenizer_name="some/tokenizer", trust_remote_code=True
        )
        assert fields["tokenizer_name"] == "some/tokenizer"
        assert fields["trust_remote_code"] is True
        assert fields["original_architecture"] == architecture
        if "quantization_method" in vars(complete(fields)):
            assert fields["quantization_method"] == "bitsandbytes"


def _gemma_3(width: int, mlp: int, layers: int, heads: tuple[int, int], **more: Any) -> Any:
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131072,
        "vocab_size": 262144,
        "sliding_window": 1024,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "sliding_window_pattern": 6,
        **more,
    }


def _gemma(model_type: str, architecture: str, sizes: tuple[int, ...], **more: Any) -> Any:
    *rest, groups, head = sizes
    grouped = {"num_key_value_heads": groups, "head_dim": head, "rope_theta": 10000.0, **more}
    return _plain(model_type, architecture, (*rest, 8192, 256000), **grouped)


def _plain(model_type: str, architecture: str, sizes: tuple[int, ...], **more: Any) -> Any:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "vocab_size",
    )
    fields = dict(zip(names, sizes, strict=True))
    return {"model_type": model_type, "architectures": [architecture], **fields, **more}


_ROPE_8 = {"rope_type": "linear", "factor": 8.0}
_LLAMA_3_2_1B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
# Official name -> the published config.json, as far as it differs from the class defaults.
PUBLISHED: dict[str, dict[str, Any]] = {
    "google/gemma-2b": _gemma(
        "gemma", "GemmaForCausalLM", (2048, 16384, 18, 8, 1, 256), hidden_act="gelu"
    ),
    "google/gemma-7b": _gemma(
        "gemma", "GemmaForCausalLM", (3072, 24576, 28, 16, 16, 256), hidden_act="gelu"
    ),
    "google/gemma-2-2b": _gemma("gemma2", "Gemma2ForCausalLM", (2304, 9216, 26, 8, 4, 256)),
    "google/gemma-2-9b": _gemma("gemma2", "Gemma2ForCausalLM", (3584, 14336, 42, 16, 8, 256)),
    "google/gemma-2-27b": _gemma(
        "gemma2", "Gemma2ForCausalLM", (4608, 36864, 46, 32, 16, 128), query_pre_attn_scalar=144
    ),
    "google/gemma-3-270m": _gemma_3(640, 2048, 18, (4, 1), sliding_window=512),
    "google/gemma-3-1b-pt": _gemma_3(1152, 6912, 26, (4, 1), sliding_window=512),
    "google/gemma-3-4b-pt": _gemma_3(
        2560, 10240, 34, (8, 4), vocab_size=262208, rope_scaling=_ROPE_8
    ),
    "google/gemma-3-12b-pt": _gemma_3(
        3840, 15360, 48, (16, 8), vocab_size=262208, rope_scaling=_ROPE_8
    ),
    "google/gemma-3-27b-pt": _gemma_3(
        5376,
        21504,
        62,
        (32, 16),
        vocab_size=262208,
        rope_scaling=_ROPE_8,
        head_dim=128,
        query_pre_attn_scalar=168,
    ),
    "allenai/OLMo-1B-hf": _plain("olmo", "OlmoForCausalLM", (2048, 8192, 16, 16, 2048, 50304)),
    "allenai/OLMo-7B-hf": _plain("olmo", "OlmoForCausalLM", (4096, 11008, 32, 32, 2048, 50304)),
    "allenai/OLMo-2-0425-1B": _plain(
        "olmo2",
        "Olmo2ForCausalLM",
        (2048, 8192, 16, 16, 4096, 100352),
        rope_theta=500000,
        rms_norm_eps=1e-6,
    ),
    "allenai/OLMo-2-1124-7B": _plain(
        "olmo2",
        "Olmo2ForCausalLM",
        (4096, 11008, 32, 32, 4096, 100352),
        rope_theta=500000,
        rms_norm_eps=1e-6,
    ),
    "meta-llama/Llama-3.2-1B": _LLAMA_3_2_1B,
}
# Fields in which stock's table computes other numbers than Hugging Face for the published config.
STOCK_IS_WRONG = {
    "google/gemma-2b": {"act_fn": "gelu_pytorch_tanh"},
    "google/gemma-7b": {"act_fn": "gelu_pytorch_tanh"},
    "google/gemma-3-27b-pt": {"attn_scale": math.sqrt(168)},
}


def _published(name: str) -> Any:
    values = copy.deepcopy(PUBLISHED[name])
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _stock_table(name: str, hf_config: Any) -> dict[str, Any]:
    class Published:
        @staticmethod
        def from_pretrained(*_args: Any, **_kwargs: Any) -> Any:
            return hf_config

    names = {"AutoConfig": Published, "get_official_model_name": lambda given: given}
    return dict(borrow(loading.convert_hf_model_config, **names)(name))


@_CURRENT
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_stocks_tables(name: str) -> None:
    hf_config = _published(name)
    table = complete({**_stock_table(name, hf_config), **STOCK_IS_WRONG.get(name, {})})
    fields, _ = translate(hf_config)
    if name == "meta-llama/Llama-3.2-1B":
        assert fields["n_ctx"] == 131072
        fields["n_ctx"] = 2048  # stock's cap, which only its own name brings about
    ours, theirs = _comparable(complete(fields)), _comparable(table)
    theirs["original_architecture"] = ours["original_architecture"]  # 4b and up: multimodal
    assert ours == theirs


@_CURRENT
@pytest.mark.parametrize("name", PUBLISHED)
def test_an_official_name_brings_stocks_own_fields(name: str) -> None:
    hf_config = _published(name)
    expected = {**_stock_table(name, hf_config), **STOCK_IS_WRONG.get(name, {})}
    expected.update(tokenizer_name=None, original_architecture=hf_config.architectures[0])
    fields, notes = translate(hf_config, official_name=name)
    assert fields == expected
    changed = [note for note in notes if "computes other numbers" in note]
    assert [note.split(" is ")[0] for note in changed] == list(STOCK_IS_WRONG.get(name, {}))


@_CURRENT
def test_config_json_wins_over_the_table_of_an_official_name() -> None:
    config = make_config("Gemma2ForCausalLM")
    fields, notes = translate(config, official_name="google/gemma-2-2b")
    assert fields == translate(config)[0]
    assert any("d_model 2304 -> 32" in note for note in notes)


@_CURRENT
def test_an_official_name_keeps_the_context_that_stock_gives_it() -> None:
    config = make_config("GPTNeoForCausalLM", max_position_embeddings=2048)
    fields, notes = translate(config, official_name="roneneldan/TinyStories-1M")
    assert fields["n_ctx"] == 512
    assert any("n_ctx is 512" in note and "2048" in note for note in notes)


def test_a_resized_vocabulary_is_seen_under_an_official_name() -> None:
    config = make_config("GPT2LMHeadModel", vocab_size=70)
    assert translate(config, official_name="gpt2")[0]["d_vocab"] == 70


_QWEN = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "kv_channels": 16,
    "seq_length": 128,
    "vocab_size": 50,
    "rotary_emb_base": 5000,
}
_SANTACODER = {
    "architectures": ["GPT2LMHeadCustomModel"],
    "model_type": "gpt2",
    "auto_map": {"AutoConfig": "configuration_gpt2_mq.GPT2CustomConfig"},
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 32,
    "vocab_size": 50,
    "activation_function": "gelu_fast",
}


def _folder_with_code(folder: Path, raw: dict[str, Any], marker: Path) -> Path:
    module, _, name = raw["auto_map"]["AutoConfig"].partition(".")
    code = (
        "from transformers import PretrainedConfig\nfrom pathlib import Path\n"
        f"Path({str(marker)!r}).touch()\nclass {name}(PretrainedConfig):\n    pass\n"
    )
    save_config(make_config("LlamaForCausalLM"), folder)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / f"{module}.py").write_text(code)
    return folder


@pytest.mark.parametrize("raw", [_QWEN, _SANTACODER], ids=["qwen", "santacoder"])
def test_code_of_a_checkpoint_runs_only_if_asked(raw: dict[str, Any], tmp_path: Path) -> None:
    marker = tmp_path / "the code ran"
    folder = _folder_with_code(tmp_path / "checkpoint", raw, marker)
    plain, _ = translate(read_config(folder, SUPPORTED, trust_remote_code=False))
    assert not marker.exists()
    assert plain["original_architecture"] == raw["architectures"][0]
    assert plain["d_model"] == 64
    assert plain["d_mlp"] == 48 if "kv_channels" in raw else 256
    read_config(folder, SUPPORTED, trust_remote_code=True)
    assert marker.exists()


def test_qwen_keeps_its_rotary_base(tmp_path: Path) -> None:
    folder = _folder_with_code(tmp_path / "checkpoint", _QWEN, tmp_path / "unused")
    fields, _ = translate(read_config(folder, SUPPORTED, trust_remote_code=False))
    assert fields["rotary_base"] == 5000
    assert fields["rotary_dim"] == 16


def test_a_value_that_plain_data_lacks_is_named(tmp_path: Path) -> None:
    raw = {key: value for key, value in _SANTACODER.items() if key != "n_head"}
    folder = _folder_with_code(tmp_path / "checkpoint", raw, tmp_path / "unused")
    config = read_config(folder, SUPPORTED, trust_remote_code=False)
    with pytest.raises(CheckpointError, match=r"this GPT2LMHeadCustomModel lacks.*n_head"):
        translate(config)


@pytest.mark.parametrize("value", [None, 0, "four"])
def test_an_impossible_value_is_an_error_of_ours(value: Any) -> None:
    class Config(SimpleNamespace):
        model_type = "qwen"

    config = Config(**{**_QWEN, "num_attention_heads": value})
    with pytest.raises(CheckpointError, match=r"QWenLMHeadModel lacks .* impossible one"):
        translate(config)


def test_the_dictionary_holds_plain_values() -> None:
    fields, _ = translate(make_config("MixtralForCausalLM"))
    plain = (str, int, float, bool, list, torch.dtype, type(None))
    assert all(isinstance(value, plain) for value in fields.values())
    assert not any(isinstance(value, numpy.generic) for value in fields.values())
