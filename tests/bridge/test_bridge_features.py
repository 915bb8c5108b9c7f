"""What one does with a lean bridge: hooks, gradients, generation, edits, subclasses; its memory."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from tests.support import bridge_stock, bridge_zoo
from tests.support.allocations import Allocations
from tests.support.bridge_comparison import differences, same_bits, snapshot, tensors_of
from tests.support.bridge_stock import quiet
from tl_fastload import LeanBridgeMixin, LeanTransformerBridge
from tl_fastload.memory_map import memory_map
from tl_fastload.recipes.promise import Promise
from tl_fastload.source.reader import FileSource

pytestmark = pytest.mark.parity

BridgeZoo = Callable[..., Path]
FEW = ("gpt2", "llama-gqa", "neox", "mixtral")
# Large enough that weights outweigh what a step allocates beside them.
LARGE = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 6, "vocab_size": 900}


def lean(folder: Path, **arguments: Any) -> Any:
    arguments = {"device": "cpu", "progress": False, **arguments}
    with quiet():
        return LeanTransformerBridge.from_pretrained_lean(folder, **arguments)


def lean_raw(folder: Path, **arguments: Any) -> Any:
    arguments = {"device": "cpu", "progress": False, **arguments}
    with quiet():
        return LeanTransformerBridge.boot_transformers_lean(folder, **arguments)


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return bridge_stock.process(bridge_stock.boot(folder, dtype))


def pair(case_id: str, bridge_zoo_folder: BridgeZoo) -> tuple[Any, Any, torch.Tensor]:
    """Stock's processed bridge, the lean one, and tokens."""
    folder = bridge_zoo_folder(case_id)
    return stock(folder), lean(folder), bridge_zoo.inputs(case_id)[0]


@pytest.mark.parametrize("case_id", FEW)
def test_gradients_are_those_of_stock(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    *bridges, tokens = pair(case_id, bridge_zoo_folder)
    for bridge in bridges:
        bridge(tokens, return_type="loss").backward()
    wanted, found = (
        {path: t.grad for path, t in tensors_of(bridge) if t.grad is not None} for bridge in bridges
    )
    assert wanted.keys() == found.keys()
    assert [path for path in wanted if not same_bits(wanted[path], found[path])] == []
    assert any(grad.abs().max() > 0 for grad in found.values())


@pytest.mark.parametrize("case_id", FEW)
def test_a_fused_optimizer_steps_as_with_stock(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    *bridges, tokens = pair(case_id, bridge_zoo_folder)
    for bridge in bridges:
        optimizer = torch.optim.AdamW(bridge.parameters(), lr=0.01, fused=True)
        for _ in range(2):
            optimizer.zero_grad()
            bridge(tokens, return_type="loss").backward()
            optimizer.step()
    wanted, found = (dict(tensors_of(bridge)) for bridge in bridges)
    assert [path for path in wanted if not same_bits(wanted[path], found[path])] == []


@pytest.mark.parametrize("case_id", FEW)
def test_hooks_change_the_same(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    *bridges, tokens = pair(case_id, bridge_zoo_folder)

    def without_the_first_position(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([torch.zeros_like(value[:, :1]), value[:, 1:]], dim=1)

    with torch.no_grad(), quiet():
        plain = bridges[1](tokens)
        for name in ("blocks.1.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.0.hook_mlp_out"):
            hooks = [(name, without_the_first_position)]
            wanted, found = (bridge.run_with_hooks(tokens, fwd_hooks=hooks) for bridge in bridges)
            assert same_bits(wanted, found)
            assert not torch.equal(found, plain)
        assert torch.equal(bridges[1](tokens), plain)


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "mamba"])
def test_it_generates_the_same(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    *bridges, _ = pair(case_id, bridge_zoo_folder)
    with quiet():
        wanted, found = (
            bridge.generate("w5 w9 w60", max_new_tokens=5, do_sample=False, verbose=False)
            for bridge in bridges
        )
    assert wanted == found
    assert len(found.split()) >= 5


def test_it_is_processed_once(
    bridge_zoo_folder: BridgeZoo, caplog: pytest.LogCaptureFixture
) -> None:
    """A second time says so and changes nothing, as in stock."""
    folder = bridge_zoo_folder("gpt2")
    for bridge in (lean(folder), bridge_stock.process(lean_raw(folder))):
        before = snapshot(bridge, "gpt2")
        caplog.clear()
        bridge.enable_compatibility_mode(disable_warnings=True)
        assert "process_weights was already applied" in caplog.text
        assert differences(before, snapshot(bridge, "gpt2")) == []


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
def test_without_processing_only_hooks_change(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    """`no_processing=True` is stock's, and weights can be processed afterwards."""
    folder = bridge_zoo_folder(case_id)
    bridges = [bridge_stock.boot(folder), lean_raw(folder)]
    for flags in ({"no_processing": True}, {}):
        wanted, found = (
            snapshot(bridge_stock.process(bridge, **flags), case_id) for bridge in bridges
        )
        apart = differences(wanted, found)
        assert apart == []


@pytest.mark.parametrize("case_id", FEW)
def test_the_file_stays_what_it_is(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    """What is mapped can be written to, and nobody else sees it."""
    folder = bridge_zoo_folder(case_id, dtype=torch.bfloat16)
    before = (folder / "model.safetensors").read_bytes()
    for load in (lean, lean_raw):
        first = load(folder, dtype=torch.bfloat16)
        wanted = snapshot(first, case_id)
        with torch.no_grad():
            for _, tensor in tensors_of(first):
                if tensor.is_floating_point():
                    tensor.fill_(3.0)
        second = load(folder, dtype=torch.bfloat16)
        assert differences(wanted, snapshot(second, case_id)) == []
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("case_id", FEW)
def test_a_state_dict_is_saved_as_small_as_stocks(
    case_id: str, bridge_zoo_folder: BridgeZoo, tmp_path: Path
) -> None:
    """`torch.save` writes whole storages: no parameter may be a window into a larger one."""
    folder = bridge_zoo_folder(case_id)
    torch.save(stock(folder).state_dict(), tmp_path / "stock.pt")
    bridge = lean(folder)
    torch.save(bridge.state_dict(), tmp_path / "lean.pt")
    sizes = [(tmp_path / name).stat().st_size for name in ("lean.pt", "stock.pt")]
    assert sizes[0] <= sizes[1] * 1.05
    other = lean(folder)
    with torch.no_grad():
        for _, tensor in tensors_of(other):
            tensor.zero_()
    other.load_state_dict(torch.load(tmp_path / "lean.pt", weights_only=True))
    wanted, found = bridge.state_dict(), other.state_dict()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def test_nothing_of_a_load_stays_alive(bridge_zoo_folder: BridgeZoo) -> None:
    """No promise anywhere in the process, no open file."""
    folder = bridge_zoo_folder("llama-gqa")
    bridges = [lean(folder), bridge_stock.process(lean_raw(folder)), lean_raw(folder)]
    bridges.append(bridge_stock.process(LeanTransformerBridge.of(bridge_stock.boot(folder))))
    gc.collect()
    assert [type(thing) for thing in gc.get_objects() if issubclass(type(thing), Promise)] == []
    open_files = [path for fd in Path("/proc/self/fd").iterdir() if (path := _target(fd))]
    assert [path for path in open_files if path.startswith(str(folder))] == []
    assert all(hasattr(bridge, "forward") for bridge in bridges)  # alive until here


def _target(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except OSError:
        return ""


def test_a_bridge_that_others_booted_stays_itself(bridge_zoo_folder: BridgeZoo) -> None:
    class Theirs(TransformerBridge):
        """A class with something of its own."""

        def answer(self) -> int:
            return 42

    booted = bridge_stock.boot(bridge_zoo_folder("gpt2"))
    booted.__class__ = Theirs
    bridge = LeanTransformerBridge.of(booted)
    assert bridge is booted
    assert isinstance(bridge, Theirs)
    assert bridge.answer() == 42
    assert LeanTransformerBridge.of(bridge) is bridge
    bridge_stock.process(bridge)
    wanted = snapshot(stock(bridge_zoo_folder("gpt2")), "gpt2")
    assert differences(wanted, snapshot(bridge, "gpt2")) == []


def test_a_class_of_ones_own_loads_lean(bridge_zoo_folder: BridgeZoo) -> None:
    class Mine(LeanBridgeMixin, TransformerBridge):
        """As the README has it."""

    folder = bridge_zoo_folder("gpt2")
    with quiet():
        bridge = Mine.from_pretrained_lean(folder, device="cpu", progress=False)
    assert type(bridge) is Mine
    wanted = snapshot(stock(folder), "gpt2")
    assert differences(wanted, snapshot(bridge, "gpt2")) == []


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
def test_a_model_in_memory(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    """It is read and stays as it is: nothing of it is in the bridge."""
    folder = bridge_zoo_folder(case_id)
    model_class = type(bridge_stock.boot(folder).original_model)
    model, other = (model_class.from_pretrained(folder) for _ in range(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = snapshot(bridge_stock.process(bridge_stock.boot(folder, hf_model=other)), case_id)
    bridge = lean(folder, hf_model=model)
    assert differences(wanted, snapshot(bridge, case_id)) == []
    with torch.no_grad():
        for _, tensor in tensors_of(bridge):
            if tensor.is_floating_point():
                tensor.fill_(3.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "gemma3"])
def test_what_the_process_has_set_is_not_asked(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    folder = bridge_zoo_folder(case_id)
    wanted = snapshot(stock(folder), case_id)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.no_grad():
            bridges = [lean(folder), bridge_stock.process(lean_raw(folder))]
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        bridges.append(lean(folder))
    for bridge in bridges:
        assert differences(wanted, snapshot(bridge, case_id)) == []


def test_shards_and_names_of_dtypes(bridge_zoo_folder: BridgeZoo) -> None:
    in_parts = bridge_zoo_folder("llama-gqa", shards=True)
    assert len(list(in_parts.glob("*.safetensors"))) == 3
    wanted = snapshot(stock(in_parts, torch.bfloat16), "llama-gqa")
    found = snapshot(lean(in_parts, dtype="bfloat16"), "llama-gqa")
    assert differences(wanted, found) == []


def test_the_report_says_what_was_done(bridge_zoo_folder: BridgeZoo) -> None:
    folder = bridge_zoo_folder("llama-gqa", dtype=torch.bfloat16)
    report = lean(folder, dtype="bfloat16").load_report
    assert report.processing["fold_ln"] == "done"
    assert report.mapped_bytes > 0
    text = str(report)
    assert "bfloat16" in text
    raw = lean_raw(folder, dtype="bfloat16").load_report
    assert raw.mapped_bytes > report.mapped_bytes


def _bytes_of(bridge: Any) -> int:
    """What the parameters and buffers of a bridge take, each storage once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for _, tensor in tensors_of(bridge)
    }
    return sum(storages.values())


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("load", [lean, lean_raw])
def test_the_memory_map_knows_every_byte(
    case_id: str, load: Callable[..., Any], bridge_zoo_folder: BridgeZoo
) -> None:
    """Of GPT-2 booted alone, Q, K and V lie in the matrix that they were made of."""
    bridge = load(bridge_zoo_folder(case_id))
    parts = memory_map(bridge)
    assert sum(part.size_bytes for part in parts) == _bytes_of(bridge)
    weights = {(part.layer, part.component) for part in parts if part.component != "buffers"}
    blocks = {(str(n), of) for n in range(bridge.cfg.n_layers) for of in ("attention", "MLP")}
    assert {("embed", "embedding"), ("unembed", "norms"), *blocks} <= weights
    assert not any(layer == "embed" for layer, of in weights if of != "embedding")


@pytest.mark.parametrize(
    ("stored", "dtype", "most"),
    [
        (torch.float32, torch.float32, 1.10),
        (torch.bfloat16, torch.float32, 1.10),
        # Mapped: the embedding, the values that no step changes.
        (torch.bfloat16, torch.bfloat16, 0.85),
    ],
    ids=["float32", "widened", "bfloat16"],
)
def test_the_most_that_is_allocated_from_files(
    stored: torch.dtype, dtype: torch.dtype, most: float, bridge_zoo_folder: BridgeZoo
) -> None:
    folder = bridge_zoo_folder("llama-gqa", dtype=stored, **LARGE)
    with Allocations() as allocations:
        bridge = lean(folder, dtype=dtype)
    assert allocations.peak_bytes < most * _bytes_of(bridge)


@pytest.mark.parametrize("case_id", ["llama-gqa", "gpt2"])
def test_the_most_that_is_allocated_in_place(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    """One parameter at a time: what takes a weight's place is counted, that weight is not."""
    large = {"n_embd": 96, "n_layer": 6} if case_id == "gpt2" else LARGE
    folder = bridge_zoo_folder(case_id, **large)
    wanted = _bytes_of(stock(folder))  # of GPT-2, the fused matrices stay beside their parts
    bridge = LeanTransformerBridge.of(bridge_stock.boot(folder))
    with Allocations() as allocations:
        bridge_stock.process(bridge)
    assert allocations.peak_bytes < 1.10 * wanted
    assert _bytes_of(bridge) < 1.02 * wanted


def test_a_weight_is_read_for_its_bias_as_well(
    bridge_zoo_folder: BridgeZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embeddings of a GPT-2 are two weights and, of the second, a bias."""
    reads: Counter[str] = Counter()
    read_into = FileSource.read_into

    def counted(self: Any, *args: Any) -> None:
        reads[self.name] += 1
        read_into(self, *args)

    monkeypatch.setattr(FileSource, "read_into", counted)
    lean(bridge_zoo_folder("gpt2"))
    assert reads["transformer.wte.weight"] == 2


@pytest.mark.parametrize("case_id", FEW)
def test_the_hooks_are_those_that_stock_finds(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    bridge = lean(bridge_zoo_folder(case_id))
    found = []
    for cls in (LeanTransformerBridge, TransformerBridge):
        bridge._hook_registry = {}
        for hook in bridge.modules():
            if isinstance(hook, HookPoint):
                hook.name = None
        cls._scan_existing_hooks(bridge, bridge, "")
        found.append([(name, id(hook), hook.name) for name, hook in bridge._hook_registry.items()])
    assert found[0] == found[1] != []


def test_looking_for_hooks_computes_nothing(
    bridge_zoo_folder: BridgeZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.Tensor] = []
    twice = property(lambda self: made.append(2 * self.unembed.weight))
    monkeypatch.setattr(TransformerBridge, "twice", twice, raising=False)
    bridge = LeanTransformerBridge.of(bridge_stock.boot(bridge_zoo_folder("gpt2")))
    made.clear()
    bridge_stock.process(bridge)
    assert [tensor for tensor in made if not tensor.is_meta] == []


def _in_memory(folder: Path) -> Any:
    """Booted around a model of which each weight has memory of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return LeanTransformerBridge.of(bridge_stock.boot(folder, hf_model=model))


def test_memory_that_nobody_else_holds_is_used_again(bridge_zoo_folder: BridgeZoo) -> None:
    """Of a Llama no step mixes weights: each is changed where it lies."""
    folder = bridge_zoo_folder("llama-gqa")
    bridge, processed = _in_memory(folder), stock(folder)
    places = {name: tensor.data_ptr() for name, tensor in tensors_of(bridge) if tensor.dim() == 2}
    bridge_stock.process(bridge)
    found, wanted = dict(tensors_of(bridge)), dict(tensors_of(processed))
    assert [name for name, place in places.items() if found[name].data_ptr() != place] == []
    assert [name for name in wanted if not same_bits(found[name], wanted[name])] == []


def _made_of_an_array(parameter: Any) -> Any:
    array = parameter.detach().numpy().copy()
    parameter.data = torch.from_numpy(array)
    return array


@pytest.mark.parametrize(
    "hold",
    [lambda p: p, lambda p: p.detach(), lambda p: p.detach().numpy(), _made_of_an_array],
    ids=["parameter", "view", "array", "made of an array"],
)
def test_memory_that_somebody_holds_stays_as_it_is(
    hold: Callable[[Any], Any], bridge_zoo_folder: BridgeZoo
) -> None:
    folder = bridge_zoo_folder("llama-gqa")
    bridge = _in_memory(folder)
    held = hold(bridge.unembed.weight)
    before = torch.as_tensor(held).detach().clone()
    bridge_stock.process(bridge)
    assert same_bits(torch.as_tensor(held), before)
    assert same_bits(bridge.unembed.weight, stock(folder).unembed.weight)
