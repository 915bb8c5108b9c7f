"""What is computed of several parts of a model that lie on several devices."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from tests.support.comparison import lean_model
from tests.support.fake_devices import FIRST, SECOND, THIRD, FakeDevices, back

TOKENS = torch.arange(1, 8)[None]
MAP = {"": str(FIRST), "blocks.1": str(SECOND), "unembed": str(THIRD)}
STACKS = ("W_K", "W_Q", "W_V", "W_O", "W_in", "W_out", "b_K", "b_Q", "b_V", "b_O", "b_in", "b_out")


def answers(model: Any) -> dict[str, Any]:
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS)
        found = {name: getattr(model, name) for name in STACKS}
        found |= {
            "logits": logits,
            "loss": model(TOKENS, return_type="loss"),
            "QK": model.QK.A,
            "OV": model.OV.AB,
            "bias": model.accumulated_bias(2, include_mlp_biases=True),
            "scores": torch.as_tensor(back(model.all_composition_scores("K"))),
            "resid": cache.accumulated_resid(),
            "parts": cache.decompose_resid(),
            "heads": cache.stack_head_results(),
            "sliced": cache.apply_slice_to_batch_dim(0).accumulated_resid(),
            "attrs": cache.logit_attrs(cache.decompose_resid(), TOKENS[:, :1], TOKENS[:, 1:2]),
        }
    return {**found, "cache": cache}


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
def test_the_numbers_are_those_of_one_device(case_id: str, zoo: Any) -> None:
    wanted = answers(lean_model(zoo(case_id)))
    with FakeDevices():
        model = lean_model(zoo(case_id), device_map=MAP)
        found = answers(model)
        assert found["W_Q"].device == FIRST
        assert found["attrs"].device == FIRST
        assert copy.copy(found["cache"]).keys() == wanted["cache"].keys()
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, back(found[name])), name
    assert type(found["cache"]) is not type(wanted["cache"])
    assert isinstance(found["cache"], type(wanted["cache"]))
    with pytest.raises(RuntimeError, match="same device"), FakeDevices():
        model.blocks[0].attn.W_Q + model.blocks[1].attn.W_Q  # the user's own, as ever


def test_other_models_and_caches_are_left_alone(zoo: Any) -> None:
    from transformer_lens import ActivationCache, HookedTransformer

    model = lean_model(zoo("gpt2"))
    _, cache = model.run_with_cache(TOKENS)
    assert type(cache) is ActivationCache
    assert type(model).W_Q is HookedTransformer.W_Q
    assert pickle.loads(pickle.dumps(model)).W_Q.equal(model.W_Q)
