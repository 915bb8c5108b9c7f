"""Formats that are read here alone stay bytes in a bridge, raw and processed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import bridge_zoo
from tests.support import quantized_packed as packed
from tests.support import quantized_zoo as qz
from tests.support.bridge_stock import quiet
from tl_fastload import LeanTransformerBridge, load_weights_, save_lean

pytestmark = pytest.mark.parity

BridgeZoo = Callable[..., Path]
LOADS = {
    "raw": LeanTransformerBridge.boot_transformers_lean,
    "processed": LeanTransformerBridge.from_pretrained_lean,
}
# Fused and interleaved heads, layers that lie the other way round.
FUSED = (("gpt2", "gptq"), ("neox", "gptq-reordered"), ("phi3", "awq"))
PAIRS = [
    *(("gpt-oss" if packed.PACKINGS[n].stacked else "llama-gqa", n) for n in packed.ONE_OF_EACH),
    *FUSED,
]
USUAL = ("fp8-ends", "ct-int-groups", "packed-zeros", "mxfp4")
HERE = [
    pytest.param(*pair, marks=[] if pair in FUSED or pair[1] in USUAL else pytest.mark.slow)
    for pair in PAIRS
    if pair[0] in bridge_zoo.CASES
]


def load(folder: Path, how: str, **arguments: Any) -> Any:
    with quiet():
        return LOADS[how](folder, device="cpu", progress=False, **arguments)


def gap(bridge: Any, folder: Path, name: str, case_id: str) -> float:
    with quiet():
        return qz.gap(qz.log_probs(bridge, case_id), qz.hf_log_probs(folder, name, case_id))


@pytest.mark.parametrize(("case_id", "name"), HERE)
def test_bytes_with_the_numbers_of_their_values(
    case_id: str, name: str, bridge_zoo_folder: BridgeZoo
) -> None:
    folder = qz.build(bridge_zoo_folder, case_id)
    file = qz.saved(folder, name)
    for how in LOADS:
        bridge = load(file, how)
        assert len(qz.quantized_parameters(bridge)) >= 2 * bridge.cfg.n_layers
        why = {text.rpartition(": ")[2] for text in bridge.load_report.not_quantized.values()}
        assert why == {"not quantized in the checkpoint"}
        assert gap(bridge, folder, name, case_id) < 1e-4, how


@pytest.mark.parametrize(("case_id", "name"), FUSED)
def test_in_place_dequantized_copied_and_filled(
    case_id: str, name: str, bridge_zoo_folder: BridgeZoo, tmp_path: Path
) -> None:
    folder = qz.build(bridge_zoo_folder, case_id)
    file = qz.saved(folder, name)
    bridge = load(file, "raw")
    with quiet():
        bridge.enable_compatibility_mode()
    held = len(qz.quantized_parameters(bridge))
    copy = load(save_lean(bridge, tmp_path / "copy", progress=False), "processed")
    with quiet():
        load_weights_(bridge, file)
    for found in (bridge, copy):
        assert len(qz.quantized_parameters(found)) == held
        assert gap(found, folder, name, case_id) < 1e-4
    dense = load(file, "processed", dequantize=True)
    assert not qz.quantized_parameters(dense)
    assert gap(dense, folder, name, case_id) < 1e-4
