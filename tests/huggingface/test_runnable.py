"""Trees of promises as transformers' own `from_pretrained` would return the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support import zoo as zoo_module
from tl_fastload.huggingface.runnable import make_runnable, tie_equal
from tl_fastload.huggingface.tree import tree_from_checkpoint, tree_from_model
from tl_fastload.recipes.evaluate import evaluate
from tl_fastload.recipes.promise import Promise
from tl_fastload.source.checkpoint import open_weights
from tl_fastload.source.hub import HubOptions
from tl_fastload.source.location import locate
from tl_fastload.source.reader import FileReader

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="bridges come with transformers 5"
)


def runnable(folder: Path, dtype: torch.dtype) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    checkpoint = open_weights(locate(folder, HubOptions()))
    promises, _ = checkpoint.promises(FileReader())
    model, ledger = tree_from_checkpoint(promises, config, config.architectures[0], dtype)
    tie_equal(model, ledger.tied)
    make_runnable(model, config, dtype, folder)
    return model


def value(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, Promise):
        return tensor
    found: torch.Tensor = evaluate(tensor.node, torch.device("cpu")).tensor
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case_id", ["gpt2", "gemma2", "llama-gqa", "mixtral", "opt"])
def test_it_is_what_transformers_loads(case_id: str, dtype: torch.dtype, zoo: Any) -> None:
    folder = zoo(case_id)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    found = runnable(folder, dtype)
    for kind in ("named_parameters", "named_buffers"):
        one = dict(getattr(wanted, kind)(remove_duplicate=False))
        other = dict(getattr(found, kind)(remove_duplicate=False))
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            made = other[name]
            assert made.requires_grad == tensor.requires_grad, name
            assert value(made).dtype == tensor.dtype, name
            assert torch.equal(value(made), tensor), name
    assert len(list(wanted.parameters())) == len(list(found.parameters()))
    assert not found.training
    assert found.config.to_dict() == wanted.config.to_dict()
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()


def test_equal_copies_of_a_tied_weight_are_tied_and_others_are_not(tmp_path: Path) -> None:
    zoo_module.build("gpt2", tmp_path)
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    save_file(weights, path, metadata={"format": "pt"})
    model = runnable(tmp_path, torch.float32)
    assert model.lm_head.weight is model.transformer.wte.weight
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, path, metadata={"format": "pt"})
    model = runnable(tmp_path, torch.float32)
    assert model.lm_head.weight is not model.transformer.wte.weight


def test_a_shadow_has_a_configuration_of_its_own(zoo: Any) -> None:
    from tl_fastload.huggingface.runnable import own_configuration

    model = transformers.AutoModelForCausalLM.from_pretrained(zoo("llama-gqa"))
    before = model.config.to_dict()
    shadow = tree_from_model(model, torch.float32)
    own_configuration(shadow)
    make_runnable(shadow, model.config, torch.bfloat16, None)
    assert model.config.to_dict() == before
    assert shadow.config is shadow.model.config
    assert shadow.config is not model.config
    assert {p.dtype for p in shadow.parameters()} == {torch.bfloat16}
