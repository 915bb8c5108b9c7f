"""The bridge's test bed: stock boots every case, and agrees with transformers or is in a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

from tests.support import bridge_stock, bridge_zoo
from tests.support.bridge_comparison import differences, modules_of, snapshot, without_values
from tests.support.bridge_zoo import (
    CASES,
    NO_FORWARD_IN_BFLOAT16,
    NOT_BOOTED,
    RAW_ONLY,
    WRONG_WHEN_PROCESSED,
)

pytestmark = pytest.mark.parity

BridgeZoo = Callable[..., Path]
TOLERANCE = 1e-4


def test_every_architecture_is_there_or_has_its_reason() -> None:
    met = {case.architecture for case in CASES.values()}
    assert met & NOT_BOOTED.keys() == set()
    assert set(SUPPORTED_ARCHITECTURES) - met - NOT_BOOTED.keys() == set()
    assert all(NOT_BOOTED.values())
    for table in (RAW_ONLY, WRONG_WHEN_PROCESSED, NO_FORWARD_IN_BFLOAT16):
        assert table.keys() <= CASES.keys()


@pytest.mark.parametrize("case_id", CASES)
def test_stock_is_transformers(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    """Raw and processed; no tensor without values, so that none in a lean bridge is stock's."""
    folder = bridge_zoo_folder(case_id)
    bridge = bridge_stock.boot(folder)
    wanted = bridge_stock.hf_log_probs(case_id, folder, type(bridge.original_model))
    raw = snapshot(bridge, case_id)
    assert (bridge_stock.log_probs(raw.logits) - wanted).abs().max() < TOLERANCE
    assert without_values(bridge) == []
    if case_id in RAW_ONLY:
        with pytest.raises(Exception, match=RAW_ONLY[case_id]):
            bridge_stock.process(bridge)
        return
    processed = snapshot(bridge_stock.process(bridge), case_id)
    off_by = (bridge_stock.log_probs(processed.logits) - wanted).abs().max().item()
    if case_id in WRONG_WHEN_PROCESSED:
        wrong_by, why = WRONG_WHEN_PROCESSED[case_id]
        assert off_by == pytest.approx(wrong_by, rel=0.2), why
    else:
        assert off_by < TOLERANCE


@pytest.mark.parametrize("case_id", NO_FORWARD_IN_BFLOAT16)
def test_stock_cannot_run_it_in_bfloat16(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    bridge = bridge_stock.boot(bridge_zoo_folder(case_id), torch.bfloat16)
    first, others = bridge_zoo.inputs(case_id, torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"), torch.no_grad():
        bridge(first, **others)


@pytest.mark.parametrize("case_id", ["gpt2", "mixtral"])
def test_a_changed_weight_is_a_difference(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    bridge = bridge_stock.boot(bridge_zoo_folder(case_id))
    before = snapshot(bridge, case_id)
    weight = bridge.blocks[0].mlp.out.weight if case_id == "gpt2" else bridge.unembed.weight
    with torch.no_grad():
        weight.view(-1)[0] += 1.0
    weight.requires_grad_(False)
    found = "\n".join(differences(before, snapshot(bridge, case_id)))
    for part in ("requires_grad False", "values up to 1.0e+00 apart", "logits: up to"):
        assert part in found
    for _, module in modules_of(bridge):
        if module._parameters.get("weight") is weight:
            module._parameters["weight"] = torch.empty_like(weight, device="meta")
    assert any(path.endswith("['weight']") for path in without_values(bridge))
