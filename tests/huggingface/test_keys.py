"""Checkpoint names into model names, as transformers would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tl_fastload.ground import compat
from tl_fastload.huggingface import keys
from tl_fastload.huggingface.keys import Ledger, rename_to_model, tied_groups
from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise

TABLES = pytest.mark.skipif(not compat.HAS_WEIGHT_CONVERSIONS, reason="transformers 4 has no table")


def model_of(class_name: str, **config: Any) -> Any:
    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        return model_class(model_class.config_class(**config))


def gpt2() -> Any:
    return model_of("GPT2LMHeadModel", vocab_size=7, n_embd=4, n_layer=1, n_head=1, n_positions=5)


def promises(*names: str, shape: tuple[int, ...] = (4,)) -> dict[str, Promise]:
    return {name: Promise.of(MemorySource(torch.ones(shape), name)) for name in names}


@pytest.fixture(params=["table", "prefix"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of renaming do what plain checkpoints need."""
    if request.param == "table" and not compat.HAS_WEIGHT_CONVERSIONS:
        pytest.skip("transformers 4 has no table")
    monkeypatch.setattr(compat, "HAS_WEIGHT_CONVERSIONS", request.param == "table")
    return str(request.param)


def test_the_prefix_of_the_base_model_comes_and_goes(way: str) -> None:
    found, ledger = rename_to_model(
        gpt2(), promises("ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"), torch.float32
    )
    assert set(found) == {"transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"}
    assert not ledger.unexpected


def test_a_base_model_loses_the_prefix(way: str) -> None:
    base = gpt2().transformer
    found, ledger = rename_to_model(base, promises("transformer.ln_f.weight"), torch.float32)
    assert set(found) == {"ln_f.weight"}
    assert not ledger.unexpected


@pytest.mark.parametrize(
    "name",
    [
        "h.0.attn.bias",
        "transformer.h.0.attn.masked_bias",
        "model.layers.3.self_attn.rotary_emb.inv_freq",
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
        "gpt_neox.layers.0.attention.bias",
        "gpt_neox.layers.0.attention.masked_bias",
    ],
)
def test_stale_buffers_are_no_surprise(name: str, way: str) -> None:
    found, ledger = rename_to_model(gpt2(), promises(name), torch.float32)
    assert not found
    assert not ledger.unexpected


@pytest.mark.parametrize(
    "name", ["h.0.attn.extra", "classifier.weight", "lm_head.bias", "h.9.ln_1.weight", ""]
)
def test_everything_else_is_unexpected(name: str, way: str) -> None:
    _, ledger = rename_to_model(gpt2(), promises(name), torch.float32)
    assert ledger.unexpected == [name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_floats_are_cast_and_integers_are_not(dtype: torch.dtype, way: str) -> None:
    model = gpt2()
    state = promises("ln_f.weight")
    state["lm_head.weight"] = Promise.of(MemorySource(torch.ones(4, dtype=torch.int8)))
    with torch.device("meta"):
        model = model.to(dtype)
    found, _ = rename_to_model(model, state, dtype)
    assert found["transformer.ln_f.weight"].dtype == dtype
    assert found["lm_head.weight"].dtype == torch.int8


@TABLES
def test_experts_are_merged() -> None:
    sizes = {"vocab_size": 7, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    model = model_of("MixtralForCausalLM", **sizes, **heads)
    names = [
        f"model.layers.0.block_sparse_moe.experts.{e}.w{w}.weight"
        for e in range(3)
        for w in (1, 2, 3)
    ]
    state = {n: promises(n, shape=(4, 6) if ".w2." in n else (6, 4))[n] for n in names}
    found, ledger = rename_to_model(model, state, torch.float32)
    shapes = {name: tuple(p.shape) for name, p in found.items()}
    assert shapes == {
        "model.layers.0.mlp.experts.gate_up_proj": (3, 12, 4),
        "model.layers.0.mlp.experts.down_proj": (3, 4, 6),
    }
    assert not ledger.unexpected


def test_tied_names() -> None:
    model = gpt2()
    model.tie_weights()
    assert tied_groups(model) == [["transformer.wte.weight", "lm_head.weight"]]
    assert tied_groups(nn.Linear(2, 2)) == []


def test_a_ledger_starts_empty_each_time() -> None:
    Ledger().unexpected.append("x")
    assert Ledger().unexpected == []
    assert keys.Ledger().misshapen == {}
