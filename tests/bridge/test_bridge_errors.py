"""Bad input to a load of a bridge: one family of errors, raised before weights are read."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import bridge_stock, bridge_zoo
from tests.support.bridge_comparison import differences, snapshot
from tests.support.bridge_stock import quiet
from tl_fastload import LeanTransformerBridge
from tl_fastload.errors import (
    ArgumentError,
    CheckpointError,
    InternalError,
    LeanLoadError,
    MissingWeightsError,
    UnknownModelError,
    UnsupportedArchitectureError,
)

pytestmark = pytest.mark.parity

BridgeZoo = Callable[..., Path]
LOADS = {
    "processed": LeanTransformerBridge.from_pretrained_lean,
    "raw": LeanTransformerBridge.boot_transformers_lean,
}


@pytest.fixture(params=LOADS)
def load(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Both ways from files."""

    def call(folder: Path | str, **arguments: Any) -> Any:
        arguments = {"device": "cpu", "progress": False, **arguments}
        with quiet():
            return LOADS[request.param](folder, **arguments)

    return call


@pytest.fixture
def folder(bridge_zoo_folder: BridgeZoo, tmp_path: Path) -> Path:
    """A Llama that the test may break."""
    return shutil.copytree(bridge_zoo_folder("llama-gqa"), tmp_path / "llama")


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.usefixtures("no_reading")
class TestBeforeWeightsAreRead:
    def test_no_folder(self, load: Any, tmp_path: Path) -> None:
        with pytest.raises(UnknownModelError, match="nowhere"):
            load(tmp_path / "nowhere")

    def test_a_name_that_is_none(self, load: Any) -> None:
        with pytest.raises(UnknownModelError, match="somebody/nothing"):
            load("somebody/nothing-of-that-name")

    def test_no_configuration(self, load: Any, folder: Path) -> None:
        (folder / "config.json").unlink()
        with pytest.raises(LeanLoadError, match=r"config\.json"):
            load(folder)

    def test_no_weights(self, load: Any, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="weight"):
            load(folder)

    def test_an_architecture_that_nobody_knows(self, load: Any, folder: Path) -> None:
        edit_config(folder, architectures=["LlamaForNothing"])
        with pytest.raises(UnsupportedArchitectureError, match="LlamaForNothing"):
            load(folder)

    def test_an_architecture_without_an_adapter(self, load: Any, folder: Path) -> None:
        config = {"architectures": ["CTRLLMHeadModel"], "model_type": "ctrl"}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedArchitectureError, match="CTRLLMHeadModel"):
            load(folder)

    def test_a_missing_weight(self, load: Any, folder: Path) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        edit_weights(folder, lambda tensors: tensors.pop(name))
        with pytest.raises(MissingWeightsError, match=name):
            load(folder)

    def test_a_weight_of_another_shape(self, load: Any, folder: Path) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        edit_weights(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
        with pytest.raises(CheckpointError, match=name):
            load(folder)

    def test_a_truncated_file(self, load: Any, folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load(folder)

    @pytest.mark.parametrize("dtype", ["float33", "int8", 16, torch.int64])
    def test_a_dtype_that_is_none(self, load: Any, folder: Path, dtype: Any) -> None:
        with pytest.raises(ArgumentError, match="dtype"):
            load(folder, dtype=dtype)

    def test_an_argument_that_nobody_takes(self, load: Any, folder: Path) -> None:
        with pytest.raises((ArgumentError, TypeError), match="fold_everything"):
            load(folder, fold_everything=True)

    def test_a_device_that_is_none(self, load: Any, folder: Path) -> None:
        with pytest.raises(ArgumentError, match="device"):
            load(folder, device="abacus")

    def test_a_step_that_is_no_flag(self, folder: Path) -> None:
        with pytest.raises(ArgumentError, match="fold_ln"):
            LeanTransformerBridge.from_pretrained_lean(folder, fold_ln="yes", progress=False)

    @pytest.mark.parametrize(
        "arguments",
        [{"device_map": "many"}, {"n_devices": 2}, {"max_memory": {0: "1GB"}}],
        ids=lambda arguments: next(iter(arguments)),
    )
    def test_spread_over_devices(self, load: Any, folder: Path, arguments: Any) -> None:
        with pytest.raises(ArgumentError, match=next(iter(arguments))):
            load(folder, **arguments)


@pytest.mark.parametrize("arguments", [{"load_weights": False}, {"hf_model": True}])
def test_boots_that_read_no_file(arguments: Any, bridge_zoo_folder: BridgeZoo) -> None:
    folder = bridge_zoo_folder("gpt2")
    if "hf_model" in arguments:
        arguments = {"hf_model": bridge_stock.boot(folder).original_model}
    for wrong in ({"dequantize": True}, {"nonsense": 1}, {"load_weights": 3}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            LeanTransformerBridge.boot_transformers_lean(folder, **{**arguments, **wrong})
    with pytest.raises(ArgumentError, match="hf_model is a int"):
        LeanTransformerBridge.boot_transformers_lean(folder, hf_model=5)


def test_a_refusal_leaves_the_bridge_as_it_was(
    bridge_zoo_folder: BridgeZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    folder = bridge_zoo_folder("llama-gqa")
    bridge = LeanTransformerBridge.of(bridge_stock.boot(folder))
    for wrong in (
        {"fold_ln": "no"},
        {"no_processing": 3},
        {"refactor_factored_attn_matrices": True},
    ):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            bridge.enable_compatibility_mode(**wrong)
        assert not bridge.compatibility_mode

    def fails(self: Any, *_: Any, **__: Any) -> None:
        self._weights_processed = True
        raise ValueError("nothing was done")

    monkeypatch.setattr(TransformerBridge, "process_weights", fails)
    with pytest.raises(UnsupportedArchitectureError, match="nothing was done"), quiet():
        bridge.enable_compatibility_mode()
    monkeypatch.undo()
    with quiet():
        bridge.enable_compatibility_mode()  # not taken for done
    wanted = bridge_stock.process(bridge_stock.boot(folder))
    assert differences(snapshot(wanted, "llama-gqa"), snapshot(bridge, "llama-gqa")) == []


class TestOf:
    def test_no_bridge(self, bridge_zoo_folder: BridgeZoo) -> None:
        stock = bridge_stock.boot(bridge_zoo_folder("gpt2"))
        for other in (stock.original_model, None, "gpt2", torch.nn.Linear(2, 2)):
            with pytest.raises(ArgumentError, match=r"TransformerBridge|boot_transformers"):
                LeanTransformerBridge.of(other)

    def test_a_compiled_bridge(self, bridge_zoo_folder: BridgeZoo) -> None:
        compiled = torch.compile(bridge_stock.boot(bridge_zoo_folder("gpt2")), backend="eager")
        with pytest.raises(ArgumentError, match="OptimizedModule"):
            LeanTransformerBridge.of(compiled)

    def test_parts_on_meta(self, bridge_zoo_folder: BridgeZoo) -> None:
        """Offloaded, or never loaded: named before anything is changed."""
        booted = bridge_stock.boot(bridge_zoo_folder("llama-gqa"))
        mlp = booted.blocks[1].mlp.original_component
        empty = torch.empty_like(mlp.down_proj.weight, device="meta")
        parent = booted.blocks[1].mlp.out.original_component
        parent.weight = torch.nn.Parameter(empty)
        first = booted.blocks[0].attn.q.weight.clone()
        with pytest.raises(LeanLoadError, match="meta"), quiet():
            LeanTransformerBridge.of(booted).enable_compatibility_mode()
        assert torch.equal(booted.blocks[0].attn.q.weight, first)

    def test_an_offloaded_bridge(self, bridge_zoo_folder: BridgeZoo) -> None:
        booted = bridge_stock.boot(bridge_zoo_folder("llama-gqa"))
        booted.original_model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
        with pytest.raises((LeanLoadError, RuntimeError), match="offload"), quiet():
            LeanTransformerBridge.of(booted).enable_compatibility_mode()

    def test_processed_already_by_stock(
        self, bridge_zoo_folder: BridgeZoo, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nothing is done twice."""
        stock = bridge_stock.process(bridge_stock.boot(bridge_zoo_folder("gpt2")))
        before = snapshot(stock, "gpt2")
        bridge = LeanTransformerBridge.of(stock)
        bridge.enable_compatibility_mode(disable_warnings=True)
        assert "process_weights was already applied" in caplog.text
        assert differences(before, snapshot(bridge, "gpt2")) == []


def test_a_promise_that_is_left_is_an_internal_error(
    bridge_zoo_folder: BridgeZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised, never returned."""
    from transformer_lens.model_bridge import TransformerBridge

    process = TransformerBridge.process_weights

    @functools.wraps(process)
    def keeps_one(self: Any, *args: Any, **kwargs: Any) -> None:
        process(self, *args, **kwargs)
        # As a component of a later TransformerLens might: a copy for itself.
        self.blocks[0].__dict__["mine"] = {"weight": [self.state_dict()["unembed.weight"]]}

    monkeypatch.setattr(TransformerBridge, "process_weights", keeps_one)
    with pytest.raises(InternalError, match="mine"), quiet():
        LeanTransformerBridge.from_pretrained_lean(
            bridge_zoo_folder("llama-gqa"), device="cpu", progress=False
        )


def test_a_load_that_stops_in_the_middle_returns_nothing(
    bridge_zoo_folder: BridgeZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, the bridge says that it is half written, and is not used by mistake."""
    from tl_fastload import HalfWrittenError
    from tl_fastload.recipes import evaluate

    booted = LeanTransformerBridge.of(bridge_stock.boot(bridge_zoo_folder("llama-gqa")))
    calls = []
    run = evaluate.Evaluation.value

    def stops(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    monkeypatch.setattr(evaluate.Evaluation, "value", stops)
    with pytest.raises((KeyboardInterrupt, HalfWrittenError)), quiet():
        booted.enable_compatibility_mode()
    monkeypatch.undo()
    with pytest.raises(HalfWrittenError), quiet():
        booted.enable_compatibility_mode()


def test_some_layers_of_an_encoder_and_a_decoder(
    bridge_zoo_folder: BridgeZoo, no_reading: None
) -> None:
    for case_id in {"blenderbot", "t5"} & bridge_zoo.CASES.keys():
        for way in (LeanTransformerBridge.from_pretrained_lean, LeanTransformerBridge.plan):
            with pytest.raises(ArgumentError, match=r"first_n_layers= is for one stack"), quiet():
                way(bridge_zoo_folder(case_id), device="cpu", first_n_layers=1)


def test_some_layers_of_an_encoder(bridge_zoo_folder: BridgeZoo) -> None:
    with quiet():
        bridge = LeanTransformerBridge.from_pretrained_lean(
            bridge_zoo_folder("bert"), device="cpu", progress=False, first_n_layers=1
        )
    assert len(bridge.blocks) == 1


@pytest.mark.parametrize(
    ("module", "name"), [("bridge.processing", "BridgeShelf"), ("placement.placer", "groups")]
)
@pytest.mark.parametrize(
    "case_id", [name for name in ("cohere", "falcon", "llama-gqa") if name in bridge_zoo.CASES]
)
def test_processing_that_stops_before_anything_is_written_leaves_the_bridge_as_it_was(
    case_id: str,
    module: str,
    name: str,
    bridge_zoo_folder: BridgeZoo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TransformerLens has run by then, on promises: it gives Falcon biases, takes Cohere's scale of
    the logits away, and has a Llama's MLP look at processed weights.
    """
    folder = bridge_zoo_folder(case_id)
    with quiet():
        booted = LeanTransformerBridge.boot_transformers_lean(folder, device="cpu", progress=False)
    before = snapshot(booted, case_id)

    def stops(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"tl_fastload.{module}.{name}", stops)
    with pytest.raises(KeyboardInterrupt), quiet():
        booted.process_weights()
    monkeypatch.undo()
    assert differences(before, snapshot(booted, case_id)) == []
    with quiet():
        booted.process_weights()
        wanted = bridge_stock.boot(folder)
        wanted.process_weights()
    assert differences(snapshot(wanted, case_id), snapshot(booted, case_id)) == []
