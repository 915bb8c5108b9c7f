"""Parts of a model over devices: where they lie by a map, and how they run elsewhere."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from tl_fastload import ArgumentError
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.placement.spread import CPU, Parts, Spread, spread
from tl_fastload.placement.streaming import put_to_work

# Another device for all that asks, and the same memory.
ELSEWHERE = torch.device("cpu", 0)


@dataclass
class Cache:
    past: torch.Tensor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4))
        self.seen: list[Any] = []

    def forward(self, x: Any, cache: Any = None, stop: bool = False) -> Any:
        self.seen.append((x.device, self.inner.weight, cache))
        if stop:
            raise ValueError("stopped")
        return self.inner(x) * self.table


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(3, 4)
        self.hook = nn.Identity()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.last = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.hook(self.embed(x))
        for block in self.blocks:
            x = block(x, cache=[Cache(x)])
        return self.last(x)


def streamed(model: nn.Module) -> Spread:
    parts = Parts.of(model).places
    return Spread(dict.fromkeys(parts, CPU), dict.fromkeys(parts, ELSEWHERE))


def at_home(model: nn.Module) -> list[int]:
    return [id(tensor) for tensor in (*model.parameters(), *model.buffers())]


def found(device_map: Any, max_memory: Any = None) -> Spread:
    model = Model()
    sizes = {name: bytes_of(tensor) for name, tensor in model.state_dict().items()}
    return spread(Parts.of(model), device_map, max_memory, lambda device: None, lambda: sizes)


def test_the_parts_are_blocks_and_what_lies_beside_them() -> None:
    blocks = [f"blocks.{index}" for index in range(4)]
    assert list(Parts.of(Model()).places) == ["embed", *blocks, "last"]


def test_the_longest_name_counts_and_the_host_runs_nothing_beside_another_device() -> None:
    where = found({"": 1, "blocks": "cpu", "blocks.2": 2, "blocks.3": "disk"})
    cuda = torch.device("cuda", 1)
    assert where.home_of("embed.weight") == where.home_of("last.bias") == cuda
    assert where.home_of("blocks.0.inner.weight") == where.home_of("blocks.3.table") == CPU
    assert where.home_of("blocks.2.inner.weight") == torch.device("cuda", 2)
    assert where.runs["blocks.0"] == where.runs["blocks.3"] == cuda == where.begins_on
    assert where.streamed == ["blocks.0", "blocks.1", "blocks.3"]
    assert where.disk == {"blocks.3"}
    assert where.describe() == (
        "Device map: cuda:1: embed, last; cpu (streamed to cuda:1): blocks.0-1; cuda:2: blocks.2; "
        "disk (streamed to cuda:1): blocks.3."
    )
    sizes = {"blocks.0.inner.weight": 10, "blocks.3.inner.weight": 7, "embed.weight": 99}
    assert where.streaming_bytes(sizes) == {cuda: 20}


def test_maps_that_are_made_split_no_block() -> None:
    limits = {"cpu": 64 + 3 * 4 * (16 + 4 + 4)}  # the embedding and three blocks
    for kind in ("auto", "balanced", "sequential"):
        where = found(kind, limits)
        kept = [part for part in where.homes if part not in where.disk]
        assert kept == list(where.homes)[: len(kept)], kind
        assert 1 < len(kept) <= 4, kind
    assert found("auto").disk == set()


def test_maps_that_are_made_keep_what_is_tied_together() -> None:
    """Under names of which one is the end of another, as well."""
    names = ("embed", "pos_embed", "blocks.0", "blocks.1", "unembed")
    parts = Parts({name: name for name in names}, (frozenset({"embed", "unembed"}),))
    sizes = {f"{name}.weight": 100 for name in names}
    for kind in ("auto", "balanced", "sequential"):
        where = spread(parts, kind, None, lambda device: None, lambda: sizes)
        assert where.homes == dict.fromkeys(names, CPU), kind
        few = spread(parts, kind, {"cpu": 350}, lambda device: None, lambda: sizes)
        assert ("embed" in few.disk) == ("unembed" in few.disk), kind
        assert 0 < len(few.disk) < len(names), kind


def test_what_is_on_disk_has_to_be_mapped() -> None:
    where = found({"": "cpu", "blocks.1": "disk"})
    where.require_mapped({"blocks.1.inner.bias": 8, "blocks.2.inner.weight": 1 << 30})
    with pytest.raises(ArgumentError, match=r"blocks\.1\.inner\.weight cannot be.*save_lean"):
        where.require_mapped({"blocks.1.inner.weight": 1 << 30, "blocks.1.inner.bias": 8})


def test_copies_run_and_parameters_stay_at_home() -> None:
    model, plain = Model(), Model()
    homes, x = at_home(model), torch.randn(2, 3)
    put_to_work(model, streamed(model))
    for run in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(x), plain(x))
    for block in model.blocks:
        ((_, weight, (cache,)),) = block.seen
        assert weight is not block.inner.weight
        assert isinstance(cache, Cache)
    assert at_home(model) == homes
    model(x).sum().backward()
    plain(x).sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_an_error_leaves_no_copy_behind() -> None:
    model = Model()
    homes = at_home(model)
    put_to_work(model, streamed(model))
    with pytest.raises(ValueError, match="stopped"):
        model.blocks[0](torch.randn(2, 4), stop=True)
    if "always_call" in nn.Module.register_forward_hook.__code__.co_varnames:
        assert at_home(model) == homes
    model(torch.randn(2, 3))
    assert at_home(model) == homes


def test_a_model_on_one_device_is_left_alone() -> None:
    model = Model()
    put_to_work(model, None)
    put_to_work(model, found({"": "cpu"}))
    assert not any(module._forward_pre_hooks for module in model.modules())
