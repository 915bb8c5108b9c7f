"""`load_weights_` into a live bridge: what a fresh load would make of the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import bridge_stock, bridge_zoo, zoo
from tests.support import quantized_zoo as qz
from tests.support.allocations import Allocations
from tests.support.bridge_comparison import differences, snapshot, tensors_of
from tests.support.bridge_stock import quiet
from tl_fastload import (
    ArgumentError,
    HalfWrittenError,
    LeanTransformerBridge,
    MissingWeightsError,
    QuantizationError,
    load_weights_,
    save_lean,
)
from tl_fastload.ground import compat
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.recipes import evaluate
from tl_fastload.request.steps import STEPS

pytestmark = pytest.mark.parity

BridgeZoo = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
LOADS = {
    "raw": LeanTransformerBridge.boot_transformers_lean,
    "processed": LeanTransformerBridge.from_pretrained_lean,
}
CASES = [
    case_id
    for case_id in ("gpt2", "llama-gqa1-tied", "mixtral", "phi3", "bloom", "gemma3", "t5")
    if case_id in bridge_zoo.CASES
]


def load(folder: Path, how: str = "processed", **arguments: Any) -> Any:
    # Not mapped, so that both have the addresses that memory of one's own has.
    arguments = {"device": "cpu", "progress": False, "mmap": False, **arguments}
    with quiet():
        return LOADS[how](folder, **arguments)


def fill(bridge: Any, source: Any, **arguments: Any) -> Any:
    with quiet():
        return load_weights_(bridge, source, **arguments)


def tuned(folder: Path, target: Path) -> Path:
    """The same model with other weights."""
    shutil.copytree(folder, target)
    model: Any = type(bridge_stock.boot(folder).original_model).from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    model.save_pretrained(target)
    return target


def spoil(bridge: Any) -> None:
    """Other values everywhere: what should be zero has to come back as that."""
    with torch.no_grad():
        for parameter in bridge.parameters():
            if not isinstance(parameter, QuantizedTensor):
                parameter.fill_(3.0)


def apart(wanted: Any, found: Any, case_id: str) -> list[str]:
    """In what two bridges differ, but for what they are called."""
    lines = differences(snapshot(wanted, case_id), snapshot(found, case_id))
    return [line for line in lines if "name" not in line]


def values(bridge: Any) -> Tensors:
    return {
        path: t.dequantize() if isinstance(t, QuantizedTensor) else t.detach().clone()
        for path, t in tensors_of(bridge)
    }


def changed(before: Tensors, bridge: Any) -> list[str]:
    now = values(bridge)
    return [path for path in before if not torch.equal(before[path], now[path])]


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("case_id", CASES)
def test_a_folder_and_a_model(
    case_id: str, how: str, bridge_zoo_folder: BridgeZoo, tmp_path: Path
) -> None:
    folder = bridge_zoo_folder(case_id)
    other = tuned(folder, tmp_path / "tuned")
    bridge, wanted = load(folder, how), load(other, how)
    identities = [(id(p), p.stride()) for p in bridge.parameters()]
    for source in (other, type(bridge.original_model).from_pretrained(other)):
        spoil(bridge)
        report = fill(bridge, source)
        assert apart(wanted, bridge, case_id) == []
    assert [(id(p), p.stride()) for p in bridge.parameters()] == identities
    assert bridge.load_report is report
    assert report.processing == wanted.load_report.processing


@pytest.mark.parametrize("how", LOADS)
def test_one_file_in_another_dtype(how: str, bridge_zoo_folder: BridgeZoo, tmp_path: Path) -> None:
    """The configuration is the one that the bridge was loaded with, here with fewer layers."""
    folder = bridge_zoo_folder("llama-gqa", num_hidden_layers=3)
    other = tuned(folder, tmp_path / "tuned")
    few = {"dtype": torch.bfloat16, **({"first_n_layers": 2} if how == "processed" else {})}
    bridge, wanted = load(folder, how, **few), load(other, how, **few)
    (other / "config.json").unlink()
    fill(bridge, other / "model.safetensors")
    assert apart(wanted, bridge, "llama-gqa") == []


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("case_id", ["gpt2", "mixtral"])
def test_a_copy_and_a_bridge(
    case_id: str, how: str, bridge_zoo_folder: BridgeZoo, tmp_path: Path
) -> None:
    folder = bridge_zoo_folder(case_id)
    other = load(tuned(folder, tmp_path / "tuned"), how)
    for source in (other, save_lean(other, tmp_path / "copy", progress=False)):
        bridge = load(folder, how)
        spoil(bridge)
        fill(bridge, source)
        assert apart(other, bridge, case_id) == []


def test_one_parameter_at_a_time(bridge_zoo_folder: BridgeZoo) -> None:
    folder = bridge_zoo_folder("llama-gqa", num_hidden_layers=6, vocab_size=400)
    bridge = load(folder)
    state = zoo.read_weights(folder)
    largest = max(p.numel() * 4 for p in bridge.parameters())
    with Allocations() as allocations:
        fill(bridge, state)
    assert allocations.peak_bytes < 1.3 * largest
    assert 2 * largest < sum(p.numel() * 4 for p in bridge.parameters())


def test_a_bridge_that_stock_has_processed(bridge_zoo_folder: BridgeZoo, tmp_path: Path) -> None:
    """Nobody knows with which steps."""
    folder = bridge_zoo_folder("gpt2")
    other = tuned(folder, tmp_path / "tuned")
    bridge = bridge_stock.process(bridge_stock.boot(folder), center_unembed=False)
    before = values(bridge)
    with pytest.raises(ArgumentError, match="with all of fold_ln"):
        fill(bridge, other)
    assert changed(before, bridge) == []
    steps = {**dict.fromkeys(STEPS, True), "center_unembed": False}
    steps["refactor_factored_attn_matrices"] = False
    fill(bridge, other, processing=steps)
    assert apart(load(other, center_unembed=False), bridge, "gpt2") == []


def test_steps_can_be_chosen(bridge_zoo_folder: BridgeZoo) -> None:
    folder = bridge_zoo_folder("gpt2")
    bridge = load(folder)
    fill(bridge, folder, processing={"fold_ln": False})
    assert apart(load(folder, fold_ln=False), bridge, "gpt2") == []
    with pytest.raises(ArgumentError, match="call enable_compatibility_mode"):
        fill(load(folder, "raw"), folder, processing={"fold_ln": True})
    with pytest.raises(ArgumentError, match="none of fold_ln"):
        fill(bridge, folder, processing={"fold_norms": True})


@pytest.mark.parametrize("how", LOADS)
def test_everything_wrong_is_told_at_once(how: str, bridge_zoo_folder: BridgeZoo) -> None:
    folder = bridge_zoo_folder("llama-gqa")
    bridge, state = load(folder, how), zoo.read_weights(folder)
    before = values(bridge)
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.0.mlp.down_proj.weight"] = torch.ones(3, 5)
    state["model.layers.0.self_attn.r_proj.weight"] = torch.ones(2)
    with pytest.raises(MissingWeightsError) as error:
        fill(bridge, state)
    for line in (
        "missing: model.layers.1.mlp.up_proj.weight",
        "misshapen: model.layers.0.mlp.down_proj.weight is (3, 5)",
        "unexpected: model.layers.0.self_attn.r_proj.weight",
    ):
        assert line in str(error.value), line
    for source in ({}, {"a.b": torch.ones(2)}):
        with pytest.raises(MissingWeightsError, match=r"missing: model\.embed_tokens"):
            fill(bridge, source)
    assert changed(before, bridge) == []


def test_a_part_of_the_weights(bridge_zoo_folder: BridgeZoo, tmp_path: Path) -> None:
    folder = bridge_zoo_folder("gpt2")
    state = zoo.read_weights(tuned(folder, tmp_path / "tuned"))
    part = {n: v for n, v in state.items() if ".1.mlp.c_proj." in n}
    assert len(part) == 2
    bridge = load(folder)
    before = values(bridge)
    report = fill(bridge, {**part, "probe": torch.ones(2)}, strict=False)
    assert changed(before, bridge) != []
    assert all("blocks.1.mlp.out" in path for path in changed(before, bridge))
    assert "probe" in report.unexpected_keys
    key = next(n for n in state if n.endswith(".1.attn.c_attn.weight"))
    with pytest.raises(MissingWeightsError, match=r"several weights, of which .*ln_1"):
        fill(bridge, {key: state[key]}, strict=False)


def test_weights_of_another_state_or_class(
    bridge_zoo_folder: BridgeZoo, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = bridge_zoo_folder("llama-gqa")
    raw, processed = load(folder, "raw"), load(folder)
    copy = save_lean(processed, tmp_path / "copy", progress=False)
    before = values(raw), values(processed)
    for source in (processed, copy):
        with pytest.raises(ArgumentError, match="are processed, and the TransformerBridge's are n"):
            fill(raw, source)
    with pytest.raises(ArgumentError, match="are not processed, and the TransformerBridge's are p"):
        fill(processed, raw)
    with pytest.raises(ArgumentError, match=r"has TransformerLens' names"):
        fill(processed, {f"_orig_mod.{name}": value for name, value in raw.state_dict().items()})
    with pytest.raises(ArgumentError, match="cannot come from a int"):
        fill(processed, 7)
    if compat.has_hooked_transformer():
        from tl_fastload import LeanHookedTransformer

        hooked = LeanHookedTransformer.from_pretrained_lean(folder, device="cpu", progress=False)
        for one, other in ((hooked, processed), (processed, hooked), (hooked, copy)):
            with pytest.raises(ArgumentError, match=r"has the weights of a \w+, and this is a"):
                fill(one, other)
    assert changed(before[0], raw) == changed(before[1], processed) == []


def test_weights_that_were_tied_and_are_not(bridge_zoo_folder: BridgeZoo) -> None:
    """They are one memory in the bridge."""
    folder = bridge_zoo_folder("llama-gqa1-tied")
    bridge, state = load(folder, "raw"), zoo.read_weights(folder)
    before = values(bridge)
    apart = {**state, "lm_head.weight": 2 * state["model.embed_tokens.weight"]}
    with pytest.raises(MissingWeightsError, match="are one memory in the bridge"):
        fill(bridge, apart)
    assert changed(before, bridge) == []


@pytest.mark.parametrize("how", LOADS)
def test_stopped_in_the_middle(
    how: str, bridge_zoo_folder: BridgeZoo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The bridge says so, until all of its weights are loaded again."""
    folder = bridge_zoo_folder("llama-gqa")
    bridge = load(folder, how)
    calls: list[int] = []
    run = evaluate.Evaluation.value

    def stops(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(evaluate.Evaluation, "value", stops)
    with pytest.raises(KeyboardInterrupt):
        fill(bridge, tuned(folder, tmp_path / "tuned"))
    monkeypatch.undo()
    state = zoo.read_weights(folder)
    key = "model.layers.1.mlp.up_proj.weight"
    for action in (
        lambda: save_lean(bridge, tmp_path / "copy"),
        lambda: bridge.enable_compatibility_mode(),
        lambda: fill(bridge, bridge),
        lambda: fill(bridge, {key: state[key]}, strict=False),
        lambda: fill(load(folder, how), bridge),
    ):
        with pytest.raises((HalfWrittenError, MissingWeightsError), match=r"half-written|several"):
            action()
    fill(bridge, folder)
    assert apart(load(folder, how), bridge, "llama-gqa") == []


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize(("case_id", "kind"), [("gpt2", "nf4"), ("llama-gqa1-tied", "int8")])
def test_a_quantized_checkpoint(
    case_id: str, kind: str, how: str, bridge_zoo_folder: BridgeZoo, tmp_path: Path
) -> None:
    folder = qz.build(bridge_zoo_folder, case_id)
    saved = qz.saved(folder, kind)
    wanted = load(saved, how)
    other = qz.hf_model(tuned(folder, tmp_path / "tuned"), kind)
    bridge, plain = load(saved, how), load(folder, how)
    fill(bridge, other)
    moved = changed(values(wanted), bridge)
    assert any("mlp" in path for path in moved)
    spoil(bridge)
    for one in (bridge, plain):
        fill(one, saved)
        assert changed(values(wanted), one) == []
    before = values(bridge)
    with pytest.raises(QuantizationError, match=f"is quantized \\({kind}\\), and the weights"):
        fill(bridge, folder)
    assert changed(before, bridge) == []
