"""Models whose values are elsewhere, or are not ours to read: refused by name, before a write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from tests.support.comparison import changed, lean_model, values
from tests.support.written_weights import RAW, other_values
from tl_fastload import ArgumentError, LeanLoadError, load_weights_, save_lean
from tl_fastload.lightning.record import record_of

CPU = torch.device("cpu")


class Packed(torch.Tensor):
    """A tensor whose bytes are not its values."""


class DTensor(torch.Tensor):
    """Named as torch's own, which needs a process group: distributed_lens.py has that one."""


def _offload(model: Any) -> None:
    accelerate.cpu_offload(model, execution_device=CPU)


def _dispatch(model: Any) -> None:
    homes = {name: "cpu" for name, _ in model.named_children()} | {"blocks.1": "disk"}
    del homes["blocks"]
    homes |= {f"blocks.{i}": "cpu" for i in range(model.cfg.n_layers) if i != 1}
    accelerate.dispatch_model(model, homes, main_device="cpu", offload_dir=model.offload_dir)


def _to_meta(model: Any) -> None:
    model.blocks[0].mlp.W_in = nn.Parameter(model.blocks[0].mlp.W_in.to("meta"))


def _buffer_to_meta(model: Any) -> None:
    model.blocks[0].attn.mask = model.blocks[0].attn.mask.to("meta")


def _pack(model: Any) -> None:
    packed = model.embed.W_E.detach().as_subclass(Packed)
    model.embed._parameters["W_E"] = nn.Parameter(packed, requires_grad=False)


def _shard(model: Any) -> None:
    part = model.embed.W_E.detach().as_subclass(DTensor)
    model.embed._parameters["W_E"] = nn.Parameter(part, requires_grad=False)


def _sparse(model: Any) -> None:
    model.embed.W_E = nn.Parameter(model.embed.W_E.detach().to_sparse())


def _parametrize(model: Any) -> None:
    parametrize.register_parametrization(model.blocks[0].mlp, "W_in", nn.Identity())


def _prune(model: Any) -> None:
    prune.l1_unstructured(model.blocks[0].mlp, "W_in", amount=0.5)


CASES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "offloaded": (_offload, r"embed\.W_E is on the meta.*remove_hook_from_submodules"),
    "dispatched": (_dispatch, r"blocks\.1\..* is on the meta.*remove_hook_from_submodules"),
    "meta": (_to_meta, r"blocks\.0\.mlp\.W_in is on the meta.*load the model first"),
    "buffer": (_buffer_to_meta, r"blocks\.0\.attn\.mask is on the meta"),
    "subclass": (_pack, r"embed\.W_E is a Packed.*ordinary"),
    "sharded": (_shard, r"embed\.W_E is one process's part.*full_tensor"),
    "sparse": (_sparse, r"embed\.W_E is torch\.sparse_coo"),
    "parametrized": (_parametrize, r"blocks\.0\.mlp\.W_in is computed.*remove_parametrizations"),
    "pruned": (_prune, r"blocks\.0\.mlp\.W_in is pruned.*prune\.remove"),
}
HERE = ("subclass", "sharded", "sparse", "parametrized", "pruned", "buffer")
"""Whose parameters have values that a record can take samples of, or at least has no need of."""


@pytest.fixture(scope="module")
def raw(zoo: Any) -> Any:
    """An unprocessed model; copied before it is changed."""
    return lean_model(zoo("gpt2"), **RAW)


def _values(model: Any) -> dict[str, torch.Tensor]:
    return {name: t for name, t in values(model).items() if not t.is_meta and not t.is_sparse}


@pytest.mark.parametrize("case", CASES)
def test_every_road_refuses(case: str, raw: Any, tmp_path: Path) -> None:
    change, message = CASES[case]
    model, given = copy.deepcopy(raw), other_values(raw)
    model.offload_dir = tmp_path / "offload"
    change(model)
    before, norms = _values(model), model.cfg.normalization_type
    roads: list[Callable[[], Any]] = [
        model.process_weights_,
        lambda: model.load_and_process_state_dict(given),
        lambda: load_weights_(model, given, strict=False),
        lambda: save_lean(model, tmp_path / "copy"),
    ]
    if case not in HERE:
        roads.append(lambda: record_of({"lens": model}))
    for road in roads:
        with pytest.raises(LeanLoadError, match=f"(?s){message}"):
            road()
    now = _values(model)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert model.cfg.normalization_type == norms
    assert not (tmp_path / "copy").exists()


def test_the_way_out_of_offloading(raw: Any) -> None:
    model = accelerate.cpu_offload(copy.deepcopy(raw), execution_device=CPU)
    given = model.state_dict()
    accelerate.hooks.remove_hook_from_submodules(model)
    with pytest.raises(ArgumentError, match=r"embed\.W_E of the state dict is on the meta"):
        raw.load_and_process_state_dict(given)
    model.process_weights_()
    wanted = copy.deepcopy(raw)
    wanted.process_weights_()
    assert not changed(values(wanted), model)
