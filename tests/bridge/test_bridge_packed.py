"""Formats that are read here alone stay bytes in a bridge: raw, processed, and as a copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bridge.test_bridge_quantized import LOADS, gap, lean
from tests.support import bridge_zoo
from tests.support import quantized_packed as packed
from tests.support import quantized_zoo as qz
from tests.support import zoo as zoo_module
from tests.support.bridge_stock import quiet
from tl_fastload import LeanTransformerBridge, load_weights_, save_lean

BridgeZoo = Callable[..., Path]
# Fused and interleaved heads, layers that lie the other way round.
FUSED = (("gpt2", "gptq"), ("neox", "gptq-reordered"), ("phi3", "awq"))
PAIRS = [
    *(("gpt-oss" if packed.PACKINGS[n].stacked else "llama-gqa", n) for n in packed.ONE_OF_EACH),
    *FUSED,
]
# Run with every version of the libraries; the others with one.
USUAL = ("fp8-ends", "ct-int-groups", "packed-zeros")
HERE = [
    pytest.param(*pair, marks=[pytest.mark.parity] if pair in FUSED or pair[1] in USUAL else [])
    for pair in PAIRS
]


@pytest.fixture
def built(bridge_zoo_folder: BridgeZoo, zoo: Any) -> Callable[[str], Path]:
    """`built(case_id)`: the folder of a case, unquantized."""
    return lambda case_id: qz.build(
        bridge_zoo_folder if case_id in bridge_zoo.CASES else zoo, case_id
    )


@pytest.mark.parametrize(("case_id", "name"), HERE)
def test_bytes_with_the_numbers_of_their_values(
    case_id: str, name: str, built: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = built(case_id)
    file = qz.saved(folder, name)
    for how in LOADS:
        bridge = lean(file, how)
        held = qz.quantized_parameters(bridge)
        per_layer = {"llama-gqa": 7, "gpt-oss": 2}.get(case_id)
        if per_layer is None:  # fused, and perhaps taken apart
            assert len(held) >= 4 * bridge.cfg.n_layers
        else:  # GGUF quantizes embeddings and unembedding, too
            assert len(held) == per_layer * bridge.cfg.n_layers + 2 * (name == "gguf")
        why = {text.rpartition(": ")[2] for text in bridge.load_report.not_quantized.values()}
        assert why <= {"not quantized in the checkpoint"}
        assert gap(bridge, folder, name, case_id) < 1e-4, how
    again = lean(save_lean(bridge, tmp_path / "copy", progress=False))
    with quiet():
        assert qz.gap(qz.log_probs(again, case_id), qz.log_probs(bridge, case_id)) < 1e-5
    copied = qz.quantized_parameters(again)
    assert copied.keys() == held.keys()
    for key, weight in held.items():
        assert torch.equal(copied[key].dequantize(), weight.dequantize()), key


@pytest.mark.parity
@pytest.mark.parametrize(("case_id", "name"), FUSED)
def test_in_place_dequantized_and_filled(
    case_id: str, name: str, built: Callable[[str], Path]
) -> None:
    folder = built(case_id)
    file = qz.saved(folder, name)
    bridge = lean(file, "raw")
    with quiet():
        bridge.enable_compatibility_mode()
    held = len(qz.quantized_parameters(bridge))
    assert gap(bridge, folder, name, case_id) < 1e-4
    with quiet():
        load_weights_(bridge, file)
    assert len(qz.quantized_parameters(bridge)) == held
    assert gap(bridge, folder, name, case_id) < 1e-4
    dense = lean(file, dequantize=True)
    assert not qz.quantized_parameters(dense)
    assert gap(dense, folder, name, case_id) < 1e-4


@pytest.mark.parametrize(
    ("name", "why"),
    [
        *((name, None) for name in ("fp8", "fp8-tensor", "gptq-8bit", "awq")),
        ("fp8-ends", "blocks go over the edges"),
        ("gptq-reordered", "differ in their groups"),
    ],
)
def test_experts_that_transformers_stacks(
    name: str, why: str | None, built: Callable[[str], Path], tmp_path: Path
) -> None:
    """Their bytes are copied below each other where a format's can be."""
    folder = built("mixtral")
    source = qz.saved(folder, name)
    for how in LOADS:
        bridge = lean(source, how)
        held, dense = qz.quantized_parameters(bridge), bridge.load_report.not_quantized
        experts = [key for key in (dense if why else held) if key.endswith("_proj")]
        assert len(experts) == 2 * bridge.cfg.n_layers
        assert not why or all(why in dense[key] for key in experts)
        assert gap(bridge, folder, name, "mixtral") < 1e-4, how
    again = lean(save_lean(bridge, tmp_path / "copy", progress=False))
    assert qz.quantized_parameters(again).keys() == held.keys()
    assert gap(again, folder, name, "mixtral") < 1e-4
    with quiet():
        plan = LeanTransformerBridge.plan(source, device="cpu")
    assert plan.parameter_bytes["quantized"] == sum(w.nbytes_stored() for w in held.values())


def test_gradients_pass_stacked_experts(built: Callable[[str], Path]) -> None:
    """Their runs of tokens are multiplied expert by expert, forwards and backwards."""
    folder = built("gpt-oss")
    found = []
    for source in (qz.saved(folder, "mxfp4"), qz.dense_folder("gpt-oss", folder, "mxfp4")):
        bridge = lean(source, "raw")
        with quiet():
            bridge(zoo_module.tokens("gpt-oss")).float().square().mean().backward()
        found.append(next(p for n, p in bridge.named_parameters() if "embed" in n).grad)
    assert qz.relative_gap(*found) < 1e-5
