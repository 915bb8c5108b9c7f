"""LoRA adapters in a bridge: stock's bridge of the model that peft has merged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

import peft

from tests.support import adapters, bridge_stock
from tests.support import quantized_zoo as qz
from tests.support.bridge_comparison import differences, snapshot
from tests.support.bridge_stock import quiet
from tl_fastload import ArgumentError, LeanTransformerBridge, UnknownModelError, load_weights_
from tl_fastload.request.steps import STEPS

BridgeZoo = Callable[..., Path]
LOADS = {
    "raw": LeanTransformerBridge.boot_transformers_lean,
    "processed": LeanTransformerBridge.from_pretrained_lean,
}
HERE = {"device": "cpu", "progress": False}


def load(folder: Path, how: str, **arguments: Any) -> Any:
    with quiet():
        return LOADS[how](folder, **HERE, **arguments)


def base(folder: Path) -> Any:
    return type(bridge_stock.boot(folder).original_model).from_pretrained(
        folder, attn_implementation="eager"
    )


def attached(folder: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base(folder), adapter)


def merged(folder: Path, adapter: Path, how: str) -> Any:
    """Stock's bridge of what peft makes, whose weights train again."""
    model = attached(folder, adapter).merge_and_unload().requires_grad_(True)
    model.config.output_attentions = True  # as where stock loads the model
    bridge = bridge_stock.boot(folder, hf_model=model)
    return bridge if how == "raw" else bridge_stock.process(bridge)


def apart(wanted: Any, found: Any, case_id: str) -> list[str]:
    lines = differences(snapshot(wanted, case_id), snapshot(found, case_id))
    return [line for line in lines if "requires_grad" not in line]  # peft freezes the base


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa1-tied", "phi3"])
def test_from_a_folder_and_in_memory(
    case_id: str, how: str, bridge_zoo_folder: BridgeZoo, tmp_path: Path
) -> None:
    folder = bridge_zoo_folder(case_id)
    adapter = adapters.make(base(folder), tmp_path / "adapter")
    wanted = merged(folder, adapter, how)
    found = load(folder, how, adapter=adapter)
    assert apart(wanted, found, case_id) == []
    assert "LoRA" in found.load_report.adapters[0]
    assert all(p.requires_grad for p in found.parameters())
    model = attached(folder, adapter)
    model.config.output_attentions = True
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert apart(wanted, load(folder, how, hf_model=model), case_id) == []
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_plans_caches_and_copies(bridge_zoo_folder: BridgeZoo, tmp_path: Path) -> None:
    folder = bridge_zoo_folder("gpt2")
    adapter = adapters.make(base(folder), tmp_path / "adapter")
    wanted = merged(folder, adapter, "processed")
    with quiet():
        plan = LeanTransformerBridge.plan(folder, adapter=adapter, device="cpu")
    assert plan.fits
    cached = {"adapter": adapter, "cache": tmp_path / "cache"}
    loads = [load(folder, "processed", **cached) for _ in range(2)]
    assert "hit" in loads[1].load_report.cache
    copy = loads[0].save_lean(tmp_path / "copy", progress=False)
    loads.append(load(copy, "processed"))
    for found in loads:
        assert apart(wanted, found, "gpt2") == []
        assert found.load_report.adapters == loads[0].load_report.adapters
    bridge = load(folder, "processed")
    with quiet():
        load_weights_(bridge, loads[2])
    assert apart(wanted, bridge, "gpt2") == []


def test_what_adapters_cannot_be_merged_into(bridge_zoo_folder: BridgeZoo, tmp_path: Path) -> None:
    folder = bridge_zoo_folder("gpt2")
    adapter = adapters.make(base(folder), tmp_path / "adapter")
    for load_, other in ((LOADS["raw"], {}), (LOADS["processed"], dict.fromkeys(STEPS, False))):
        with pytest.raises(UnknownModelError, match="nowhere"):
            load_(folder, **HERE, **other, adapter=tmp_path / "nowhere")
        with pytest.raises(ArgumentError, match="requantize=True is for"):
            load_(folder, **HERE, **other, adapter=adapter, requantize=True)
    with pytest.raises(ArgumentError, match="adapter= is for weights"):
        LOADS["raw"](folder, **HERE, adapter=adapter, load_weights=False)
    saved = qz.saved(qz.build(bridge_zoo_folder, "gpt2"), "nf4")
    with pytest.raises(ArgumentError, match="Pass requantize=True"):
        load(saved, "raw", adapter=adapter)
