"""Rotary embeddings: the numbers of Hugging Face, or a warning that says where they differ."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.components import Attention
from transformers import AutoModelForCausalLM

from tests.support.tiny_configs import (
    AVAILABLE,
    complete,
    largest_difference,
    make_config,
    translate,
)
from tl_fastload.errors import NumbersWarning, UnsupportedArchitectureError
from tl_fastload.ground.compat import TRANSFORMERS
from tl_fastload.hooked import rope_tables
from tl_fastload.hooked.config_repairs import FIELD_DEFAULTS, rope_of
from tl_fastload.hooked.config_rope import (
    Rope,
    RopeContext,
    RopePair,
    read_rope,
    refuse_unknown,
    rope_fields,
)
from tl_fastload.hooked.rope_tables import put_rope_tables

_LINEAR = {"rope_type": "linear", "factor": 2.5}
_LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_HALF = {"rotary_pct": 0.5, "rope_theta": 700.0}
_LONG = {"type": "longrope", "long_factor": [2.0, 3.0, 4.0, 5.0]}
_SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": _LINEAR,
    "llama3": _LLAMA_3,
    "yarn": _YARN,
    "longrope": {
        "rope_type": "longrope",
        "factor": 3.0,
        "original_max_position_embeddings": 40,
        "short_factor": [1.0, 1.1, 1.3, 1.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
}
_NEEDS_YARN = "use_yarn_rope"
_SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

# Architecture, keywords, the field of HookedTransformerConfig that it takes (if not always there).
EXACT: dict[str, tuple[str, dict[str, Any], str]] = {
    "base": ("LlamaForCausalLM", {"rope_theta": 700.0}, ""),
    "base that is no integer": ("Qwen2ForCausalLM", {"rope_theta": 12345.5}, ""),
    "base of neox": ("GPTNeoXForCausalLM", {"rotary_emb_base": 700}, ""),
    "head_dim": ("LlamaForCausalLM", {"head_dim": 12}, ""),
    "linear": ("LlamaForCausalLM", {"rope_scaling": _LINEAR}, ""),
    "linear in old words": (
        "LlamaForCausalLM",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "",
    ),
    "linear, partial": ("GPTNeoXForCausalLM", {**_HALF, "rope_scaling": _LINEAR}, ""),
    "linear, windows": ("MistralForCausalLM", {"rope_scaling": _LINEAR}, ""),
    "linear, some windows": ("Qwen3ForCausalLM", {**_SLIDING, "rope_scaling": _LINEAR}, ""),
    "linear, full layers only": (
        "Gemma3ForCausalLM",
        {"rope_scaling": _LINEAR, "rope_local_base_freq": 300.0},
        "rotary_base_local",
    ),
    "factor 1": ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 1.0}}, ""),
    "llama3": ("LlamaForCausalLM", {"rope_scaling": _LLAMA_3}, ""),
    "llama3 elsewhere": ("Qwen2ForCausalLM", {"rope_scaling": _LLAMA_3}, ""),
    "llama3, windows": ("MistralForCausalLM", {"rope_scaling": _LLAMA_3}, ""),
    "yarn": ("LlamaForCausalLM", {"rope_scaling": _YARN}, _NEEDS_YARN),
    "yarn, qwen": ("Qwen2ForCausalLM", {"rope_scaling": _YARN}, _NEEDS_YARN),
    "yarn, mscale": (
        "MistralForCausalLM",
        {"rope_scaling": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.1, "truncate": False}},
        _NEEDS_YARN,
    ),
    "yarn, attention_factor": (
        "LlamaForCausalLM",
        {"rope_scaling": {**_YARN, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}},
        _NEEDS_YARN,
    ),
    "yarn, full layers only": (
        "Olmo3ForCausalLM",
        {"rope_theta": 700.0, "rope_scaling": _YARN},
        "yarn_global_attn_only",
    ),
    "partial": ("Phi3ForCausalLM", {"partial_rotary_factor": 0.5}, ""),
    "partial, phi": ("PhiForCausalLM", {"partial_rotary_factor": 0.75}, ""),
    "longrope, short inputs": (
        "Phi3ForCausalLM",
        {
            "rope_scaling": {**_LONG, "short_factor": [1.0] * 4},
            "original_max_position_embeddings": 40,
        },
        "",
    ),
    "dynamic, short inputs": (
        "LlamaForCausalLM",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "",
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_exact(case: str) -> None:
    architecture, keywords, field = EXACT[case]
    if architecture not in AVAILABLE or (field and field not in FIELD_DEFAULTS):
        pytest.skip(f"this TransformerLens or transformers has no {architecture} or {field}")
    assert largest_difference(make_config(architecture, **keywords), tokens=40) < 1e-4


@pytest.mark.skipif(Version("5.0") > TRANSFORMERS, reason="the notation of transformers 5")
def test_the_notation_of_transformers_5() -> None:
    flat = {"rope_theta": 700.0, **_LINEAR}
    assert largest_difference(make_config("LlamaForCausalLM", rope_parameters=flat)) < 1e-4
    nested = {
        "full_attention": {"rope_theta": 9000.0, **_LINEAR},
        "sliding_attention": {"rope_theta": 700.0, "rope_type": "default"},
    }
    assert largest_difference(make_config("Gemma3ForCausalLM", rope_parameters=nested)) < 1e-4


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_a_fraction_that_transformers_does_not_read(architecture: str) -> None:
    plain = {"rope_type": "default", "rope_theta": 700.0}
    for changes in (
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {**plain, "partial_rotary_factor": 0.5}},
    ):
        config = make_config(architecture, **changes)
        fields, _ = translate(config)
        assert fields.get("rotary_dim", fields["d_head"]) == fields["d_head"]
        if Version("5.0") <= TRANSFORMERS:  # before, it could not run
            assert largest_difference(config) < 1e-4


def test_longrope_takes_the_factors_that_transformers_takes_for_n_ctx() -> None:
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    config = make_config(
        "Phi3ForCausalLM",
        rope_scaling={"type": "longrope", **factors},
        original_max_position_embeddings=16,
    )
    fields, _ = translate(config)
    assert fields["n_ctx"] == 16
    assert largest_difference(config, tokens=16) < 1e-4
    notes = put_rope_tables(HookedTransformer(complete(fields)), config)
    assert "short factors" in notes[1]
    assert "made for 64: a larger" in notes[1]
    with pytest.warns(NumbersWarning, match="n_ctx=48 takes the long factors.* more than 16 tok"):
        assert largest_difference(config, tokens=40, n_ctx=48) < 1e-4
    with pytest.warns(NumbersWarning, match="load with n_ctx=16"):  # and it is true
        assert largest_difference(config, tokens=12, n_ctx=48) > 1e-3


def test_dynamic_scaling_is_warned_of_where_it_begins() -> None:
    config = make_config("LlamaForCausalLM", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumbersWarning)
        assert largest_difference(config, tokens=60) < 1e-4
    with pytest.warns(NumbersWarning, match="'dynamic'.* more than 64 tokens"):
        assert largest_difference(config, tokens=80, n_ctx=80) > 1e-3


def _rope(kind: str, base: float = 10000.0, **params: Any) -> Rope:
    return Rope(kind, base, 1.0, params)


def _context(**changes: Any) -> RopeContext:
    values = {
        "max_positions": 64,
        "has_sliding": False,
        "has_full": True,
        "original_positions": None,
        "fields": frozenset(FIELD_DEFAULTS),
    }
    return RopeContext(**{**values, **changes})


def test_linear_scaling_without_its_own_field() -> None:
    older = frozenset(FIELD_DEFAULTS) - {"rotary_scaling_factor"}
    linear = _rope("linear", factor=3.0)
    values, needs_tables = rope_fields(RopePair(linear, linear), _context(fields=older))
    assert not needs_tables
    config = make_config("LlamaForCausalLM", rope_scaling={"rope_type": "linear", "factor": 3.0})
    by_factor = _table(complete({**translate(config)[0]}))
    by_parts = _table(complete({**translate(config)[0], **values, **_off("rotary_scaling_factor")}))
    assert (by_factor - by_parts).abs().max() < 1e-5


def _off(name: str) -> dict[str, Any]:
    return {name: FIELD_DEFAULTS[name]} if name in FIELD_DEFAULTS else {}


def _table(cfg: HookedTransformerConfig) -> Any:
    return Attention(cfg).rotary_sin


@pytest.mark.parametrize("kind", ["yarn", "linear", "llama3", "longrope"])
def test_tables_are_those_that_fields_give_and_more(kind: str) -> None:
    """Every scaling that a layer may have, with nothing but tables of transformers."""
    config = make_config("LlamaForCausalLM", rope_scaling=_SCALINGS[kind])
    pair, context = rope_of(translate(config)[0], config)
    cfg = complete({**translate(config)[0], "n_ctx": 40})
    sine, cosine = rope_tables._tables(pair.full, context, cfg, torch.device("cpu"))
    own = AutoModelForCausalLM.from_config(config).model.rotary_emb(
        torch.zeros(1), torch.arange(40)[None]
    )
    assert (cosine - own[0][0]).abs().max() < 1e-6
    assert (sine - own[1][0]).abs().max() < 1e-6


def test_scaling_that_no_field_says_needs_tables() -> None:
    older = frozenset(name for name in FIELD_DEFAULTS if "yarn" not in name)
    yarn = _rope("yarn", factor=4.0, original_max_position_embeddings=16)
    none = {"rotary_base": 10000.0}
    assert rope_fields(RopePair(yarn, yarn), _context(fields=older)) == (none, True)
    for kind in ("llama3", "linear", "longrope"):
        full = _rope(kind, factor=2.0, original_max_position_embeddings=16, attention_factor=1.2)
        fields = frozenset(FIELD_DEFAULTS) - {"rotary_scaling_factor"}
        context = _context(has_sliding=True, fields=fields)
        assert rope_fields(RopePair(full, _rope("default")), context) == (none, True)
    pair = RopePair(_rope("default"), _rope("linear", base=300.0, factor=2.0))
    assert rope_fields(pair, _context(has_sliding=True))[1]


@pytest.mark.skipif(Version("5.0") > TRANSFORMERS, reason="the notation of transformers 5")
def test_each_kind_of_layer_has_its_tables() -> None:
    for full, sliding in (("llama3", "default"), ("default", "linear"), ("yarn", "linear")):
        nested = {
            "full_attention": {"rope_theta": 9000.0, **_SCALINGS[full]},
            "sliding_attention": {"rope_theta": 700.0, **_SCALINGS[sliding]},
        }
        assert largest_difference(make_config("Gemma3ForCausalLM", rope_parameters=nested)) < 1e-4


def test_only_the_rope_of_layers_that_exist_counts() -> None:
    pair = RopePair(_rope("dynamic"), _rope("default", base=300.0))
    context = _context(has_sliding=True, has_full=False)
    assert rope_fields(pair, context) == ({"rotary_base": 300.0}, False)


def test_an_unknown_kind_is_refused() -> None:
    for kind in ("spiral", "proportional"):
        with pytest.raises(UnsupportedArchitectureError, match=f"'{kind}'"):
            refuse_unknown([_rope("default"), _rope(kind)])


def test_legacy_attributes_are_read() -> None:
    scaling = {"type": "su", "factor": 2.0}
    config = SimpleNamespace(rope_theta=500.0, rope_scaling=scaling, partial_rotary_factor=0.5)
    pair = read_rope(config)
    assert pair.full == pair.sliding == Rope("longrope", 500.0, 0.5, scaling)
    config = SimpleNamespace(rotary_emb_base=7, rotary_pct=0.25)
    assert read_rope(config).full == Rope("default", 7, 0.25, {})
    config = SimpleNamespace(
        model_type="gemma3_text", rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=_LINEAR
    )
    pair = read_rope(config)
    assert (pair.full.kind, pair.full.base) == ("linear", 1e6)
    assert (pair.sliding.kind, pair.sliding.base) == ("default", 1e4)
