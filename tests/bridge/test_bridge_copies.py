"""Processed copies of bridges, the cache of them, plans: equal, mapped, and told from others."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import bridge_stock, bridge_zoo
from tests.support.bridge_comparison import differences, snapshot, without_values
from tests.support.bridge_stock import quiet
from tl_fastload import (
    ArgumentError,
    CheckpointError,
    LeanTransformerBridge,
    save_lean,
    verify_copy,
)
from tl_fastload.copies import cache as copies_cache
from tl_fastload.ground import compat
from tl_fastload.recipes.promise import Promise
from tl_fastload.request.steps import STEPS

pytestmark = pytest.mark.parity

BridgeZoo = Callable[..., Path]
UNPROCESSED = dict.fromkeys(STEPS, False)


def lean(folder: Path, **arguments: Any) -> Any:
    with quiet():
        return LeanTransformerBridge.from_pretrained_lean(
            folder, **{"device": "cpu", "progress": False, **arguments}
        )


def raw(folder: Path, **arguments: Any) -> Any:
    with quiet():
        return LeanTransformerBridge.boot_transformers_lean(
            folder, **{"device": "cpu", "progress": False, **arguments}
        )


def saved(bridge: Any, folder: Path) -> Path:
    return save_lean(bridge, folder, progress=False)


WANTED = (
    *("gpt2", "llama-gqa", "neox", "bloom", "mixtral", "phi3", "mamba", "gpt-oss", "t5", "bart"),
)
CASES = [case_id for case_id in WANTED if case_id in bridge_zoo.CASES]


@pytest.mark.parametrize("load", [lean, raw])
@pytest.mark.parametrize("case_id", CASES)
def test_a_copy_is_the_bridge_that_was_saved(
    case_id: str, load: Any, bridge_zoo_folder: BridgeZoo, tmp_path: Path
) -> None:
    bridge = load(bridge_zoo_folder(case_id))
    copy = saved(bridge, tmp_path / "copy")
    verify_copy(copy)
    found = load(copy, verify=True) if load is lean else load(copy)
    report = found.load_report
    wanted = snapshot(bridge, case_id)
    assert differences(wanted, snapshot(found, case_id)) == []
    del wanted
    assert without_values(found) == []
    assert report.mapped_bytes == report.parameter_bytes
    assert report.processing == bridge.load_report.processing
    assert type(found) is LeanTransformerBridge
    gc.collect()
    assert [one for one in gc.get_objects() if type(one) is Promise] == []


def test_what_somebody_has_changed_is_saved(bridge_zoo_folder: BridgeZoo, tmp_path: Path) -> None:
    bridge = lean(bridge_zoo_folder("gpt2"), dtype="bfloat16", first_n_layers=1)
    with torch.no_grad():
        bridge.blocks[0].mlp.out.weight.mul_(2)
        bridge.blocks[0].attn.q.weight.requires_grad_(False)
    bridge.cfg.use_attn_result = True
    found = lean(saved(bridge, tmp_path / "copy"))
    assert found.cfg.use_attn_result
    assert not found.blocks[0].attn.q.weight.requires_grad
    assert differences(snapshot(bridge, "gpt2"), snapshot(found, "gpt2")) == []


def test_a_bridge_of_stock_is_saved_as_well(bridge_zoo_folder: BridgeZoo, tmp_path: Path) -> None:
    bridge = bridge_stock.process(bridge_stock.boot(bridge_zoo_folder("gpt2")))
    found = lean(saved(bridge, tmp_path / "copy"))
    assert differences(snapshot(bridge, "gpt2"), snapshot(found, "gpt2")) == []


def test_a_raw_copy_can_be_processed(bridge_zoo_folder: BridgeZoo, tmp_path: Path) -> None:
    folder = bridge_zoo_folder("llama-gqa")
    found = raw(saved(raw(folder), tmp_path / "copy"))
    with quiet():
        found.enable_compatibility_mode()
    assert differences(snapshot(lean(folder), "llama-gqa"), snapshot(found, "llama-gqa")) == []


@pytest.mark.parametrize("way", ["process_weights_", "process_weights", "no_processing"])
def test_what_was_processed_in_place_is_saved(
    way: str, bridge_zoo_folder: BridgeZoo, tmp_path: Path
) -> None:
    bridge = raw(bridge_zoo_folder("gpt2"))
    with quiet():
        if way == "no_processing":
            bridge.enable_compatibility_mode(no_processing=True)
        else:
            getattr(bridge, way)(center_unembed=False)
    processed = bridge.load_report.processing
    assert processed["fold_ln"] == ("done" if way != "no_processing" else "skipped: not asked for")
    assert processed["center_unembed"] == "skipped: not asked for"
    copy = saved(bridge, tmp_path / "copy")
    steps = UNPROCESSED if way == "no_processing" else {"center_unembed": False}
    found = lean(copy, **steps)
    assert found.compatibility_mode == (way != "process_weights")
    assert differences(snapshot(bridge, "gpt2"), snapshot(found, "gpt2")) == []


def test_processing_in_place_is_compatibility_mode(bridge_zoo_folder: BridgeZoo) -> None:
    folder = bridge_zoo_folder("gpt2")
    bridge = raw(folder)
    with quiet():
        bridge.process_weights_()
    assert differences(snapshot(lean(folder), "gpt2"), snapshot(bridge, "gpt2")) == []


def test_a_copy_is_of_one_road(
    bridge_zoo_folder: BridgeZoo, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = bridge_zoo_folder("gpt2")
    copy = saved(lean(folder), tmp_path / "copy")
    unprocessed = saved(raw(folder), tmp_path / "raw")
    other = tmp_path / "other"
    if compat.has_hooked_transformer():
        from tl_fastload import LeanHookedTransformer

        saved(LeanHookedTransformer.from_pretrained_lean(folder, device="cpu"), other)
    request.getfixturevalue("no_reading")
    if compat.has_hooked_transformer():
        with pytest.raises(
            ArgumentError, match=r"copy of a TransformerBridge.*use LeanTransformer"
        ):
            LeanHookedTransformer.from_pretrained_lean(copy)
        with pytest.raises(ArgumentError, match=r"copy of a HookedTransformer.*use LeanHooked"):
            lean(other)
        with pytest.raises(ArgumentError, match="use LeanHookedTransformer"):
            LeanTransformerBridge.plan(other)
    with pytest.raises(
        ArgumentError, match=r"saved with these processing steps.*Pass fold_ln=True"
    ):
        raw(copy)
    with pytest.raises(ArgumentError, match=r"dtype=torch.bfloat16 was asked for"):
        lean(copy, dtype=torch.bfloat16)
    with pytest.raises(ArgumentError, match="Load it with boot_transformers_lean"):
        lean(unprocessed)
    with pytest.raises(ArgumentError, match="without compatibility mode"):
        lean(unprocessed, **UNPROCESSED)


def test_a_copy_that_does_not_fit_the_bridge(
    bridge_zoo_folder: BridgeZoo, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bridge = lean(bridge_zoo_folder("gpt2"))
    bridge.original_model.register_parameter("other", torch.nn.Parameter(torch.zeros(2)))
    copy = saved(bridge, tmp_path / "copy")
    request.getfixturevalue("no_reading")
    with pytest.raises(CheckpointError, match="not in the bridge: other"):
        lean(copy)


def test_the_cache_keeps_bridges(
    bridge_zoo_folder: BridgeZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, home = bridge_zoo_folder("neox"), tmp_path / "cache"
    first, second = lean(folder, cache=home), lean(folder, cache=home)
    assert "filled" in first.load_report.cache
    assert "hit" in second.load_report.cache
    assert differences(snapshot(first, "neox"), snapshot(second, "neox")) == []
    assert len(copies_cache.entries(home)) == 1
    plan = LeanTransformerBridge.plan(folder, device="cpu", cache=home)
    assert "A processed copy" in plan.notes[0]
    assert plan.mapped_bytes == second.load_report.mapped_bytes
    if compat.has_hooked_transformer():
        from tl_fastload import LeanHookedTransformer

        hooked = LeanHookedTransformer.from_pretrained_lean(folder, device="cpu", cache=home)
        assert "filled" in hooked.load_report.cache
    monkeypatch.setenv("TL_FASTLOAD_CACHE", str(home))
    assert "hit" in lean(folder).load_report.cache


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("arguments", [{}, {"dtype": "bfloat16"}, UNPROCESSED])
def test_a_plan_foretells_the_load(
    case_id: str, arguments: Any, bridge_zoo_folder: BridgeZoo
) -> None:
    folder = bridge_zoo_folder(case_id)
    with quiet():
        plan = LeanTransformerBridge.plan(folder, device="cpu", **arguments)
    report = lean(folder, **arguments).load_report
    assert plan.fits
    # TransformerLens makes a few biases of zeros that no weight is read for.
    planned = plan.total_bytes - plan.parameter_bytes["buffers"]
    assert 0 <= report.parameter_bytes - planned < 1000
    assert plan.mapped_bytes == report.mapped_bytes
    assert plan.stock_peak_host_bytes is None
    assert "TransformerBridge" in str(plan.stock_note)
    assert plan.dtype == report.dtype


def test_layouts_are_one(bridge_zoo_folder: BridgeZoo) -> None:
    bridge = lean(bridge_zoo_folder("gpt2"))
    before = {name: (id(p), p.stride()) for name, p in bridge.named_parameters()}
    assert bridge.to_layout_("stock") is bridge
    assert before == {name: (id(p), p.stride()) for name, p in bridge.named_parameters()}
    with pytest.raises(ArgumentError, match="layout"):
        bridge.to_layout_("sideways")
