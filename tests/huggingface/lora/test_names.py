"""Adapters whose tensors have other names than the model's modules: older ones, wrappers' parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import adapters, reference
from tl_fastload import AdapterError

TEXT = r".*language_model.*\.(q_proj|v_proj|up_proj|down_proj)"
BASE, MODEL = "base_model.model.", "base_model.model.model."


def test_names_of_earlier_transformers_and_of_wrappers(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("gemma3-vision")
    adapter = adapters.for_case("gemma3-vision", folder, tmp_path / "now", target_modules=TEXT)
    tensors = adapters.read(adapter)
    wanted = adapters.lean(folder, adapter)
    # Saved before transformers 4.52; peft loads it as well, which is the judge here.
    former = {
        key.replace(f"{MODEL}language_model.", f"{BASE}language_model.model."): value
        for key, value in tensors.items()
    }
    assert former.keys().isdisjoint(tensors)
    settings = {"target_modules": TEXT, "alpha_pattern": {"layers.0.self_attn.q_proj": 11}}
    older = adapters.write(tmp_path / "older", former, **settings)
    newer = adapters.write(tmp_path / "newer", tensors, **settings)
    merged = adapters.merged_by_peft("gemma3-vision", folder, older)
    other = adapters.merged_by_peft("gemma3-vision", folder, newer)
    own = dict(other.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in merged.named_parameters())
    lean = adapters.lean(folder, older)
    assert not adapters.gaps(lean, adapters.lean(folder, newer))
    assert adapters.gaps(lean, wanted)
    # peft leaves what a wrapper has renamed where it is, and says so in a warning at most.
    for number, put in enumerate(
        (
            lambda key: key.replace(BASE, f"{BASE}_orig_mod."),
            lambda key: f"_orig_mod.{key}",
            lambda key: f"module.{key}",
            lambda key: key.replace(BASE, "base_model.module.model."),
            lambda key: key.replace(".self_attn.", "._orig_mod.self_attn."),
        )
    ):
        wrapped = {put(key): value for key, value in tensors.items()}
        target = adapters.write(tmp_path / str(number), wrapped, target_modules=TEXT)
        assert not adapters.gaps(adapters.lean(folder, target), wanted)
    twice = {**tensors, **{key: value.clone() for key, value in former.items()}}
    target = adapters.write(tmp_path / "twice", twice, target_modules=TEXT)
    with pytest.raises(AdapterError, match="are the same module"):
        adapters.lean(folder, target)


def test_tied_weights_of_which_none_is_trained(zoo: Any, tmp_path: Path) -> None:
    """Unsloth sets `ensure_weight_tying` whatever is trained."""
    folder = zoo("gpt2")
    plain = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    adapter = adapters.for_case("gpt2", folder, tmp_path / "plain", **plain)
    tensors = adapters.read(adapter)
    tying = adapters.write(tmp_path / "tying", tensors, ensure_weight_tying=True, **plain)
    merged = adapters.merged_by_peft("gpt2", folder, tying)
    stock = adapters.stock_of("gpt2", merged, tmp_path / "merged")
    assert max(adapters.gaps(adapters.lean(folder, tying), stock).values(), default=0) < 1e-6
    trained = {**plain, "modules_to_save": ["wte"], "ensure_weight_tying": True}
    tied = adapters.for_case("gpt2", folder, tmp_path / "tied", **trained)
    with pytest.raises(AdapterError, match=r"ensure_weight_tying: transformer\.wte.*hf_model="):
        adapters.lean(folder, tied)


def test_a_resized_vocabulary(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("llama")
    hf = reference.hf_model("llama", folder)
    hf.resize_token_embeddings(hf.config.vocab_size + 3)
    adapter = adapters.make(hf, tmp_path / "more", modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(AdapterError, match=r"resize_token_embeddings.*hf_model=peft_model"):
        adapters.lean(folder, adapter)
