"""Bitsandbytes weights stay bytes in a bridge, raw and processed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import bridge_stock, bridge_zoo, zoo
from tests.support import quantized_trace as trace
from tests.support import quantized_zoo as qz
from tests.support.bridge_stock import quiet
from tl_fastload import LeanTransformerBridge
from tl_fastload.errors import ArgumentError
from tl_fastload.quantized import QuantizedTensor, quantize

pytestmark = pytest.mark.parity

BridgeZoo = Callable[..., Path]
Compare = Callable[[Any, Path, str, str], None]
MOST = 1e-4
ONE_STEP = 0.1
"""Most that activations on the rounding boundaries of 8-bit kernels may make of float noise."""

LOADS = {
    "raw": LeanTransformerBridge.boot_transformers_lean,
    "processed": LeanTransformerBridge.from_pretrained_lean,
}
KINDS = ("int8", "nf4-double", "fp4")
EACH = [(case_id, KINDS[n % 3]) for n, case_id in enumerate(qz.CASES)]
FEW = [(case_id, kind) for case_id in ("gpt2", "neox", "phi3") for kind in qz.CONFIGS]
FEW.append(("qwen2", "int8"))  # folded value biases put an activation on a boundary
HERE = [pair for pair in dict.fromkeys(EACH + FEW) if pair[0] in bridge_zoo.CASES]


def lean(source: Any, how: str = "processed", **arguments: Any) -> Any:
    arguments = {"device": "cpu", "progress": False, "dtype": torch.float32, **arguments}
    with quiet():
        return LOADS[how](source, **arguments)


def gap(bridge: Any, folder: Path, kind: str, case_id: str) -> float:
    with quiet():
        return qz.gap(qz.log_probs(bridge, case_id), qz.hf_log_probs(folder, kind, case_id))


@pytest.fixture
def assert_same(monkeypatch: pytest.MonkeyPatch) -> Compare:
    """`assert_same(bridge, folder, kind, case_id)`: within MOST; in 8 bits, or apart by rounding,
    as is shown.
    """

    def compare(bridge: Any, folder: Path, kind: str, case_id: str) -> None:
        apart = gap(bridge, folder, kind, case_id)
        if apart < MOST:
            return
        assert kind.startswith("int8"), apart
        assert apart < ONE_STEP
        tokens = zoo.tokens(case_id)
        stored = next(iter(qz.quantized_parameters(bridge).values())).content.stored
        with quiet():
            theirs = trace.kernel_inputs_of_hf(qz.hf_model(folder, kind), tokens)
            ours = trace.kernel_inputs_of(bridge, tokens, monkeypatch)
            assert trace.parts_by_rounding(theirs, ours, stored.threshold), apart
            # And it is the cause: without the float noise in front of the kernels, none is left.
            same = trace.log_probs_on_their_inputs(bridge, tokens, theirs, monkeypatch)
        assert qz.gap(same, qz.hf_log_probs(folder, kind, case_id)) < MOST

    return compare


def stock_quantized(folder: Path, kind: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=qz.config(kind),
        dtype=torch.float32,
        attn_implementation="eager",
        device_map={"": "cpu"},
    )


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize(("case_id", "kind"), HERE)
def test_log_probs_are_those_of_the_quantized_model(
    case_id: str, kind: str, how: str, bridge_zoo_folder: BridgeZoo, assert_same: Compare
) -> None:
    folder = qz.build(bridge_zoo_folder, case_id)
    bridge = lean(qz.saved(folder, kind), how)
    kept = qz.quantized_parameters(bridge)
    assert len(kept) >= len(list(qz.layers(qz.hf_model(folder, kind)))) - _fused_again(case_id)
    assert_same(bridge, folder, kind, case_id)


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("kind", ["nf4-double", "fp4"])
def test_rows_that_are_no_whole_blocks(kind: str, how: str, bridge_zoo_folder: BridgeZoo) -> None:
    """bitsandbytes' kernel for AVX-512 CPUs misreads them, so transformers' model is no judge."""
    sizes = qz.wide("mixtral")
    folder = bridge_zoo_folder("mixtral", **{**sizes, "head_dim": 8})
    bridge = lean(qz.saved(folder, kind), how)
    rows = [value.content.stored.shape[1] for value in qz.quantized_parameters(bridge).values()]
    assert 32 in rows  # half a block
    dense = AutoModelForCausalLM.from_pretrained(
        qz.dense_folder("mixtral", folder, kind),
        dtype=torch.float32,
        attn_implementation="eager",
    )
    with quiet():
        wanted = qz.log_probs(lambda tokens: dense(tokens).logits, "mixtral")
        assert qz.gap(qz.log_probs(bridge, "mixtral"), wanted) < MOST


def _fused_again(case_id: str) -> int:
    # TransformerLens puts BLOOM's heads together again: one of q, k, v and it is what the file had.
    return 2 if case_id == "bloom" else 0


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "neox"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_log_probs_are_those_of_the_dequantized_matrices(
    case_id: str, kind: str, bridge_zoo_folder: BridgeZoo
) -> None:
    """By the format's definition, whatever kernels do."""
    folder = qz.build(bridge_zoo_folder, case_id)
    dense = AutoModelForCausalLM.from_pretrained(
        qz.dense_folder(case_id, folder, kind), dtype=torch.float32, attn_implementation="eager"
    )
    with quiet():
        wanted = qz.log_probs(lambda tokens: dense(tokens).logits, case_id)
        found = qz.log_probs(lean(qz.saved(folder, kind)), case_id)
    assert qz.gap(found, wanted) < MOST


@pytest.mark.parametrize("case_id", ["gpt2", "neox", "qwen3"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_every_way_there_is_the_same(case_id: str, kind: str, bridge_zoo_folder: BridgeZoo) -> None:
    """From a model in memory, which stays as it is, and from a raw bridge, in place."""
    folder = qz.build(bridge_zoo_folder, case_id)
    model = stock_quantized(folder, kind)
    bridges = [lean(folder, hf_model=model), lean(qz.saved(folder, kind), "raw")]
    before = {
        name: tensor.content.stored.dense(torch.float32)
        for name, tensor in qz.quantized_parameters(bridges[1]).items()
    }
    bridge_stock.process(bridges[1])
    for name, tensor in qz.quantized_parameters(bridges[1]).items():
        assert torch.equal(tensor.content.stored.dense(torch.float32), before[name]), name
    for bridge in bridges:
        assert len(qz.quantized_parameters(bridge)) == len(before)
        assert gap(bridge, folder, kind, case_id) < MOST
    assert type(next(qz.layers(model))[1]).__module__.startswith("bitsandbytes")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("case_id", ["opt", "llama-gqa"])
def test_a_bridge_that_stock_booted(case_id: str, kind: str, bridge_zoo_folder: BridgeZoo) -> None:
    """Stock refuses to process it."""
    folder = qz.build(bridge_zoo_folder, case_id)
    booted = bridge_stock.boot(folder, hf_model=stock_quantized(folder, kind))
    bridge = bridge_stock.process(LeanTransformerBridge.of(booted))
    assert len(qz.quantized_parameters(bridge)) >= 12
    assert gap(bridge, folder, kind, case_id) < MOST


@pytest.mark.parametrize(
    "case_id", [c for c in ("gpt2", "gpt-neo", "phi3") if c in bridge_zoo.CASES]
)
def test_quantizing_while_loading(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    """The processed matrix is quantized, [out, in] whichever way round the layer has it."""
    folder = qz.build(bridge_zoo_folder, case_id)
    dense = dict(lean(folder).named_parameters())
    kept = qz.quantized_parameters(lean(folder, quantize=qz.config("nf4")))
    assert len(kept) >= 12
    for name, tensor in kept.items():
        turn = torch.t if _is_conv1d(case_id, name) else torch.positive
        wanted = quantize(turn(dense[name]).contiguous(), "nf4").dequantize()
        assert torch.equal(turn(tensor.dequantize()), wanted), name


def _is_conv1d(case_id: str, name: str) -> bool:
    return case_id == "gpt2" and re.search(r"\.attn\.[qkv]\.", name) is None


def test_ordinary_weights_of_a_quantized_checkpoint(bridge_zoo_folder: BridgeZoo) -> None:
    folder = qz.build(bridge_zoo_folder, "gpt2")
    bridge = lean(qz.saved(folder, "nf4"), dequantize=True)
    assert not qz.quantized_parameters(bridge)
    assert gap(bridge, folder, "nf4", "gpt2") < MOST


def test_it_is_a_model_of_plain_layers(bridge_zoo_folder: BridgeZoo) -> None:
    """Nothing says that transformers' quantizer is at work."""
    folder = qz.build(bridge_zoo_folder, "gpt2")
    for bridge in (
        lean(qz.saved(folder, "nf4")),
        lean(folder, hf_model=stock_quantized(folder, "nf4")),
    ):
        assert not hasattr(bridge.original_model.config, "quantization_config")
        assert not getattr(bridge.original_model, "is_quantized", False)
        assert not list(qz.layers(bridge.original_model))


def test_dense_parameters_train(bridge_zoo_folder: BridgeZoo) -> None:
    bridge = lean(qz.saved(qz.build(bridge_zoo_folder, "llama-gqa"), "nf4"))
    for parameter in bridge.parameters():
        assert parameter.requires_grad is not isinstance(parameter, QuantizedTensor)


@pytest.mark.usefixtures("no_reading")
def test_refactoring_needs_values(bridge_zoo_folder: BridgeZoo) -> None:
    saved = qz.saved(qz.build(bridge_zoo_folder, "gpt2"), "nf4")
    with pytest.raises(ArgumentError, match="refactor_factored_attn_matrices"):
        lean(saved, refactor_factored_attn_matrices=True)


def test_refactoring_in_place_changes_nothing(bridge_zoo_folder: BridgeZoo) -> None:
    folder = qz.build(bridge_zoo_folder, "gpt2")
    bridge = lean(qz.saved(folder, "nf4"), "raw")
    with pytest.raises(ArgumentError, match="refactor_factored_attn_matrices"), quiet():
        bridge.enable_compatibility_mode(refactor_factored_attn_matrices=True)
    assert gap(bridge, folder, "nf4", "gpt2") < MOST
