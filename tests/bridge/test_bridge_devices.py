"""Bridges over several devices, and with parts that are copied to where they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import bridge_zoo, commands
from tests.support.bridge_comparison import differences, same_bits, same_values, snapshot
from tests.support.bridge_stock import quiet
from tests.support.fake_devices import FIRST, SECOND, THIRD, FakeDevices, back
from tl_fastload import ArgumentError, LeanTransformerBridge, load_weights_, save_lean
from tl_fastload.bridge.copied import stored
from tl_fastload.bridge.parts import parts_of
from tl_fastload.bridge.road import ROAD
from tl_fastload.placement.spread import CPU, Spread

pytestmark = pytest.mark.parity

BridgeZoo = Callable[..., Path]
# Tied embeddings and fused attention; grouped heads; experts. As they are booted, and processed.
CASES = [("gpt2", True), ("gpt2", False), ("llama-gqa", False), ("mixtral", True)]
MAPS = {
    "apart": {"": str(FIRST), "blocks.1": str(SECOND), "ln_final": str(THIRD)},
    "streamed": {"": str(FIRST), "blocks": "cpu", "blocks.1": str(FIRST)},
}


def load(folder: Path, *, raw: bool = False, **arguments: Any) -> Any:
    where = {} if "device_map" in arguments else {"device": "cpu"}
    way = "boot_transformers_lean" if raw else "from_pretrained_lean"
    with quiet():
        return getattr(LeanTransformerBridge, way)(folder, progress=False, **where, **arguments)


def last_apart(bridge: Any) -> dict[str, str]:
    """A map over two devices that has tied parts together."""
    n_layers = bridge.cfg.n_layers
    return {"": str(FIRST), f"blocks.{n_layers - 1}": str(SECOND)}


@pytest.mark.parametrize(("case_id", "raw"), CASES)
def test_the_numbers_are_those_of_one_device(
    case_id: str, raw: bool, bridge_zoo_folder: BridgeZoo
) -> None:
    """Logits, every activation, the loss, and what hooks change: bit for bit."""
    folder = bridge_zoo_folder(case_id)
    plain = load(folder, raw=raw)
    tokens, _ = bridge_zoo.inputs(case_id, torch.float32)

    def zeros(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([torch.zeros_like(value[:, :1]), value[:, 1:]], dim=1)

    def answers(bridge: Any) -> tuple[Any, ...]:
        with quiet(), torch.no_grad():
            logits, cache = bridge.run_with_cache(tokens)
            hooks = [("blocks.1.hook_resid_pre", zeros), ("blocks.0.attn.hook_z", zeros)]
            hooked = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
            return logits, bridge(tokens, return_type="loss"), hooked, dict(cache)

    *wanted, wanted_cache = answers(plain)
    for name, given in MAPS.items():
        with FakeDevices():
            bridge = load(folder, raw=raw, device_map=given)
            at_home = {str(t.device) for t in bridge.blocks[0].parameters()}
            *found, cache = answers(bridge)
        assert at_home == {"cpu" if name == "streamed" else str(FIRST)}
        assert {str(t.device) for t in bridge.blocks[0].parameters()} == at_home
        assert all(same_bits(one, back(two)) for one, two in zip(wanted, found, strict=True))
        assert {value.device for value in found} == {CPU}  # where the tokens came from
        assert list(cache) == list(wanted_cache)
        assert all(same_values(wanted_cache[n], back(cache[n])) for n in cache), name
        ran_on = {str(v.device) for v in cache.values() if isinstance(v, torch.Tensor)}
        assert ran_on == ({str(FIRST)} if name == "streamed" else set(MAPS["apart"].values()))
        assert bridge.cfg.device == str(FIRST)
        assert bridge.cfg.n_devices == (2 if name == "streamed" else 3)
        with pytest.warns(UserWarning, match="ignored: model is dispatched"):
            bridge.to("cpu")


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
def test_it_generates_the_same(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    folder = bridge_zoo_folder(case_id)
    plain = load(folder)
    settings = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    tokens = torch.arange(1, 6)[None]
    with quiet():
        wanted = plain.generate(tokens, **settings)
    with FakeDevices(), quiet():
        bridge = load(folder, device_map=last_apart(plain))
        assert torch.equal(back(bridge.generate(tokens, **settings)), wanted)


def streamed(bridge: Any) -> Any:
    """A bridge whose parts run on another device than they lie on, which has the same memory."""
    places = parts_of(stored(bridge)).places
    elsewhere = dict.fromkeys(places, torch.device("cpu", 0))
    ROAD.put_to_work(bridge, Spread(dict.fromkeys(places, CPU), elsewhere, places=places))
    return bridge


@pytest.mark.parametrize(
    ("case_id", "arguments"),
    [("bloom", {"raw": True}), ("gpt2", {"quantize": "8bit"}), ("bloom", {"quantize": "nf4"})],
)
def test_streamed_parts_compute_the_same(
    case_id: str, arguments: Any, bridge_zoo_folder: BridgeZoo
) -> None:
    folder = bridge_zoo_folder(case_id)
    wanted = snapshot(load(folder, **arguments), case_id)
    bridge = streamed(load(folder, device_map={"": "cpu"}, **arguments))
    for _ in range(2):
        assert differences(wanted, snapshot(bridge, case_id)) == []


def test_streamed_bridges_are_worked_on_as_others(bridge_zoo_folder: BridgeZoo) -> None:
    """Their values are at home, so that what reads or writes them finds them."""
    folder = bridge_zoo_folder("gpt2")
    wanted = snapshot(load(folder), "gpt2")
    bridge = streamed(load(folder, raw=True))
    with quiet():
        bridge.enable_compatibility_mode(disable_warnings=True)
    assert differences(wanted, snapshot(bridge, "gpt2")) == []
    with torch.no_grad():
        bridge.blocks[0].mlp.out.weight.zero_()
        load_weights_(bridge, folder)
    assert differences(wanted, snapshot(bridge, "gpt2")) == []


def test_gradients_flow_back_to_where_the_weights_are(bridge_zoo_folder: BridgeZoo) -> None:
    folder = bridge_zoo_folder("gpt2")
    plain, bridge = load(folder, raw=True), streamed(load(folder, raw=True))
    for one in (plain, bridge):
        one(torch.arange(1, 6)[None], return_type="loss").backward()
    wanted = {name: p.grad for name, p in plain.original_model.named_parameters()}
    for name, parameter in bridge.original_model.named_parameters():
        grad = wanted[name]
        assert (grad is None) == (parameter.grad is None), name
        assert grad is None or torch.equal(grad, parameter.grad), name


def test_what_is_one_memory_is_copied_once(
    bridge_zoo_folder: BridgeZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's fused projection, and the three that are views of it."""
    from tl_fastload.placement.streaming import _Queue

    copied: list[int] = []
    stock = _Queue.copies

    def counted(self: Any, tensors: Any, device: Any) -> Any:
        copied.append(sum(tensor.nbytes for tensor in tensors))
        return stock(self, tensors, device)

    monkeypatch.setattr(_Queue, "copies", counted)
    bridge = streamed(load(bridge_zoo_folder("gpt2"), raw=True))
    with torch.no_grad():
        bridge(torch.arange(1, 6)[None])
    block = {t.untyped_storage()._cdata: t.untyped_storage() for t in bridge.blocks[0].parameters()}
    assert sum(storage.nbytes() for storage in block.values()) in copied


def test_names_of_parts(bridge_zoo_folder: BridgeZoo, no_reading: None) -> None:
    """The bridge's, or transformers'; what is wrong is named before anything is read."""
    folder = bridge_zoo_folder("gpt2")
    plan = LeanTransformerBridge.plan
    home = "Device map: cpu: embed, pos_embed, blocks.0-1, ln_final, unembed."
    for given in ("auto", {"": "cpu"}, {"transformer": "cpu", "lm_head": "cpu"}):
        assert home in plan(folder, device_map=given).notes
    for given, message in (
        ({"": "cpu", "transformer.h.7": 0}, "transformer.h.7"),
        ({"": "cpu", "transformer.h.0.attn": 0}, "splits blocks.0"),
        ({"transformer.h": "cpu"}, "says nothing of embed"),
        ({"": "cpu", "blocks.0": 97}, "cuda:97"),
        ("much", "device_map"),
    ):
        for load_ in (plan, LeanTransformerBridge.boot_transformers_lean):
            with pytest.raises(ArgumentError, match=message):
                load_(folder, device_map=given)


def test_maps_that_are_made_take_a_bridge_with_tied_embeddings(
    bridge_zoo_folder: BridgeZoo,
) -> None:
    booted = load(bridge_zoo_folder("gpt2"), raw=True, device_map="auto")
    assert booted.load_report.notes[-1].endswith("embed, pos_embed, blocks.0-1, ln_final, unembed.")


def test_the_command_line(bridge_zoo_folder: BridgeZoo) -> None:
    given = ("--road", "bridge", "--device-map", '{"": "disk", "embed": "cpu"}')
    found = commands.run("plan", bridge_zoo_folder("gpt2"), *given, code=0)
    assert "Device map: cpu: embed" in commands.flat(found.output)


def test_what_cannot_be_apart(bridge_zoo_folder: BridgeZoo, no_reading: None) -> None:
    with FakeDevices():
        with pytest.raises(
            ArgumentError, match=r"tied weights.*embed on lazy:0, unembed on lazy:1"
        ):
            load(
                bridge_zoo_folder("gpt2"),
                raw=True,
                device_map={"": str(FIRST), "unembed": str(SECOND)},
            )
        with pytest.raises(ArgumentError, match=r"lazy:0, lazy:1.*recurrent state"):
            load(
                bridge_zoo_folder("mamba"),
                raw=True,
                device_map={"": str(FIRST), "blocks.1": str(SECOND)},
            )
    with pytest.raises(ArgumentError, match="device_map= spreads weights that are read from files"):
        load(bridge_zoo_folder("gpt2"), raw=True, device_map={"": "cpu"}, load_weights=False)


def test_copies_over_devices(bridge_zoo_folder: BridgeZoo, tmp_path: Path) -> None:
    plain = load(bridge_zoo_folder("llama-gqa"))
    tokens = torch.arange(1, 6)[None]
    given = last_apart(plain)
    with FakeDevices(), torch.no_grad(), quiet():
        save_lean(plain, tmp_path / "copy")
        bridge = load(tmp_path / "copy", device_map=given)
        assert same_bits(back(bridge(tokens)), plain(tokens))
        assert bridge.cfg.n_devices == 2
        assert bridge.load_report.notes[-1].endswith("lazy:1: blocks.2.")
    with pytest.raises(ArgumentError, match=r"blocks\.9"):
        LeanTransformerBridge.plan(tmp_path / "copy", device_map={"": "cpu", "blocks.9": "cpu"})
    mapped = load(tmp_path / "copy", device_map={"": "disk"})
    assert mapped.load_report.mapped_bytes > 0.9 * mapped.load_report.parameter_bytes
    plan = LeanTransformerBridge.plan(tmp_path / "copy", device_map={"": "disk"})
    assert plan.mapped_bytes == mapped.load_report.mapped_bytes
    assert differences(snapshot(plain, "llama-gqa"), snapshot(mapped, "llama-gqa")) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("quantize", [None, "8bit", "nf4"])
def test_on_a_gpu(quantize: Any, bridge_zoo_folder: BridgeZoo) -> None:
    """Blocks on the host are streamed, and weights of both places are stacked."""
    folder, tokens = bridge_zoo_folder("llama-gqa"), torch.arange(1, 6)[None]
    whole = LeanTransformerBridge.from_pretrained_lean(folder, device="cuda", quantize=quantize)
    bridge = load(folder, device_map={"": 0, "blocks.1": "cpu"}, quantize=quantize)
    with torch.no_grad():
        wanted, found = whole(tokens.cuda()), bridge(tokens.cuda())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert {p.device.type for p in bridge.blocks[1].parameters()} == {"cpu"}
    if quantize is None:
        assert torch.equal(bridge.W_Q.cpu(), whole.W_Q.cpu())
