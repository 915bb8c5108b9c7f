"""Every format that is only read, on a TransformerBridge: raw, processed, and as a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bridge.test_bridge_quantized import lean
from tests.support import quantized_packed as packed
from tests.support import quantized_zoo as qz
from tests.support import zoo as zoo_module
from tests.support.bridge_stock import quiet


@pytest.mark.parametrize("name", packed.ONE_OF_EACH)
def test_bytes_stay_bytes(name: str, zoo: Any, tmp_path: Path) -> None:
    case_id = "gpt-oss" if packed.PACKINGS[name].stacked else "llama-gqa"
    folder = qz.build(zoo, case_id)
    expected = qz.hf_log_probs(folder, name, case_id)
    for how in ("raw", "processed"):
        bridge = lean(qz.saved(folder, name), how)
        held = qz.quantized_parameters(bridge)
        assert len(held) == (2 if case_id == "gpt-oss" else 7) * bridge.cfg.n_layers
        with quiet():
            assert qz.gap(qz.log_probs(bridge, case_id), expected) < 1e-4
    bridge.save_lean(tmp_path / "copy")
    with quiet():
        again = lean(tmp_path / "copy")
        assert qz.gap(qz.log_probs(again, case_id), qz.log_probs(bridge, case_id)) < 1e-5
    copied = qz.quantized_parameters(again)
    assert copied.keys() == held.keys()
    for key, weight in held.items():
        assert torch.equal(copied[key].dequantize(), weight.dequantize()), key


def test_gradients_pass_stacked_experts(zoo: Any) -> None:
    """Their runs of tokens are multiplied expert by expert, forwards and backwards."""
    folder = qz.build(zoo, "gpt-oss")
    found = []
    for source in (qz.saved(folder, "mxfp4"), qz.dense_folder("gpt-oss", folder, "mxfp4")):
        bridge = lean(source, "raw")
        with quiet():
            bridge(zoo_module.tokens("gpt-oss")).float().square().mean().backward()
        found.append(next(p for n, p in bridge.named_parameters() if "embed" in n).grad)
    assert qz.relative_gap(*found) < 1e-5
