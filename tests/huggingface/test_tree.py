"""The module tree that converters walk: transformers' own, a bare one, or a shadow."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig

from tests.support import reference
from tests.support.fake_hub import resolve
from tests.support.programs import CPU, assert_same
from tl_fastload.errors import CheckpointError
from tl_fastload.huggingface import tree
from tl_fastload.recipes.evaluate import evaluate, sources
from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise
from tl_fastload.source.reader import FileReader


def tree_of(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    promises, _ = resolve(folder).promises(FileReader())
    config = AutoConfig.from_pretrained(folder)
    return tree.tree_from_checkpoint(promises, config, config.architectures[0], dtype)


def value_of(promise: Any) -> torch.Tensor:
    value: torch.Tensor = evaluate(promise.node, CPU).tensor
    return value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case_id",
    ["gpt2", "gpt2-hub", "llama-gqa1-tied", "mixtral", "olmoe", "gemma3-vision", "gpt-oss"],
)
def test_a_tree_holds_what_transformers_loads(case_id: str, dtype: torch.dtype, zoo: Any) -> None:
    model, ledger = tree_of(zoo(case_id), dtype)
    expected = reference.hf_model(case_id, zoo(case_id), dtype)
    wanted = dict(expected.named_parameters(remove_duplicate=False))
    found = dict(model.named_parameters(remove_duplicate=False))
    assert found.keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert isinstance(found[name], Promise)
        assert_same(value_of(found[name]), parameter.detach())
    assert not ledger.unexpected
    assert not ledger.misshapen


def test_tied_weights_are_one_source(zoo: Any) -> None:
    model, _ = tree_of(zoo("llama-gqa1-tied"))
    embed = sources(model.model.embed_tokens.weight.node)[0].source
    head = sources(model.lm_head.weight.node)[0].source
    assert embed is head


def test_building_a_tree_costs_and_leaves_nothing(zoo: Any) -> None:
    level, dtype = logging.getLogger("transformers").level, torch.get_default_dtype()
    config = AutoConfig.from_pretrained(zoo("gpt2"))
    before = config.to_dict()
    model, _ = tree.tree_from_checkpoint({}, config, "GPT2LMHeadModel", torch.float16)
    assert all(p.device.type == "cpu" for p in model.parameters())  # where they will be
    assert torch.get_default_dtype() is dtype
    assert logging.getLogger("transformers").level == level
    assert config.to_dict() == before
    with pytest.raises(CheckpointError, match=r"transformer\.wte\.weight"):
        value_of(model.transformer.wte.weight)


def test_settings_come_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, config: Any) -> None:
            raise ValueError("cannot be built")

    monkeypatch.setattr(transformers, "BrokenForCausalLM", Broken, raising=False)
    level, dtype = logging.getLogger("transformers").level, torch.get_default_dtype()
    with pytest.raises(ValueError, match="cannot be built"):
        tree.tree_from_checkpoint({}, transformers.GPT2Config(), "BrokenForCausalLM", torch.float16)
    assert torch.get_default_dtype() is dtype
    assert logging.getLogger("transformers").level == level
    assert torch.empty(1).device.type == "cpu"


def test_what_does_not_fit_is_in_the_ledger(zoo: Any) -> None:
    folder = zoo("llama")
    promises, _ = resolve(folder).promises(FileReader())
    promises["extra"] = Promise.of(MemorySource(torch.ones(2), "extra"))
    promises["model.norm.weight"] = Promise.of(MemorySource(torch.ones(3), "model.norm.weight"))
    config = AutoConfig.from_pretrained(folder)
    _, ledger = tree.tree_from_checkpoint(promises, config, "LlamaForCausalLM", torch.float32)
    assert ledger.unexpected == ["extra"]
    assert ledger.misshapen == {"model.norm.weight": ((3,), (config.hidden_size,))}


def promise(*shape: int) -> Promise:
    return Promise.of(MemorySource(torch.zeros(shape)))


def test_a_bare_tree_has_attributes_and_items() -> None:
    promises = {
        "transformer.h.0.attn.weight": promise(2, 3),
        "transformer.h.1.attn.weight": promise(2, 3),
        "transformer.wte.weight": promise(5, 3),
        "transformer.count": Promise.of(MemorySource(torch.zeros(2, dtype=torch.int64))),
    }
    config = object()
    root, _ = tree.tree_from_checkpoint(promises, config, "NoSuchForCausalLM", torch.bfloat16)
    assert root.config is config
    assert root.transformer.h[1].attn.weight.dtype == torch.bfloat16
    assert root.transformer.count.dtype == torch.int64
    names = dict(root.named_parameters())
    assert set(promises) <= set(names)
    assert len(list(root.parameters())) == len(names)


def shadow_of(model: nn.Module) -> Any:
    return tree.tree_from_model(model, torch.float32)


def test_a_shadow_shares_nothing_that_changes(zoo: Any) -> None:
    model = reference.hf_model("llama-gqa1-tied", zoo("llama-gqa1-tied"))
    shadow = shadow_of(model)
    assert type(shadow) is type(model)
    assert all(isinstance(parameter, Promise) for parameter in shadow.parameters())
    assert shadow.config is model.config
    assert shadow.lm_head.weight is shadow.model.embed_tokens.weight  # tied, as in the model
    shadow.model.layers[0].mlp = None
    shadow.lm_head.weight = None
    del shadow.model.norm
    assert isinstance(model.lm_head.weight, nn.Parameter)
    assert model.model.layers[0].mlp is not None
    assert model.model.norm is not None
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in shadow_of(model).named_parameters()] == names


def test_a_model_without_values_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(CheckpointError, match=r"1\.weight.*meta"):
        shadow_of(model)
