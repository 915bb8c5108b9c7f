"""Lightning modules that are compiled, copied, pickled, nested or distributed."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.lightning_modules import PACKAGES, embedded, fit, sae_class, save, seeded
from tl_fastload import ArgumentError, DifferentModelError
from tl_fastload.ground import compat
from tl_fastload.lightning import RECORD_KEY, FrozenSubmodulesMixin

PL = PACKAGES[0]
both = pytest.mark.parametrize("package", PACKAGES)


class Bare(FrozenSubmodulesMixin, nn.Module):
    """The mixin needs no Lightning for state dicts."""

    frozen_submodules = ("probe.lens",)

    def __init__(self, compiled: str = "") -> None:
        super().__init__()
        self.probe = nn.Module()
        lens = nn.Linear(3, 3)
        with torch.no_grad():
            lens.weight.fill_(0.5)
            lens.bias.fill_(0.25)
        self.probe.lens = torch.compile(lens) if compiled == "lens" else lens
        self.probe.head = nn.Linear(3, 2)
        if compiled == "probe":
            self.probe = torch.compile(self.probe)
        self.shared = nn.ModuleList([lens])  # the same module under a second name
        self.tied = lens.bias
        self.train()


@pytest.mark.parametrize("saved", ["", "lens", "probe"])
@pytest.mark.parametrize("loaded", ["", "lens", "probe"])
def test_nested_shared_and_compiled(saved: str, loaded: str) -> None:
    one, other = Bare(saved), Bare(loaded)
    state = one.state_dict()
    prefix = "probe._orig_mod." if saved == "probe" else "probe."
    assert list(state) == [f"{prefix}head.weight", f"{prefix}head.bias"]
    assert not one.probe.lens.weight.requires_grad
    assert one.probe.head.weight.requires_grad
    other.load_state_dict(state)
    assert torch.equal(other.probe.head.weight, one.probe.head.weight)
    other.load_state_dict(nn.Module.state_dict(one))
    with torch.no_grad():
        one.probe.lens.weight.fill_(2)
    with pytest.raises(DifferentModelError, match=r"probe\.lens differ in 1 parameters: weight"):
        other.load_state_dict(nn.Module.state_dict(one))
    outer = nn.Sequential(nn.Linear(1, 1), other)
    assert sorted(outer.state_dict()) == sorted(
        ["0.weight", "0.bias", *(f"1.{key}" for key in other.state_dict())]
    )


@pytest.mark.parametrize("compiled", ["", "lens", "probe"])
def test_inside_of_another_module(compiled: str) -> None:
    """As averages of weights hold it: its own `load_state_dict` is not called there."""
    averaged = torch.optim.swa_utils.AveragedModel(Bare(compiled))
    state = averaged.state_dict()
    with torch.no_grad():
        averaged.module.probe.head.weight.zero_()
    averaged.load_state_dict(state)
    copy.deepcopy(averaged).load_state_dict(pickle.loads(pickle.dumps(state)))
    head = next(key for key in state if key.endswith("head.weight"))
    del state[head]
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        averaged.load_state_dict(state)
    assert head in str(caught.value)
    assert "lens" not in str(caught.value)


@pytest.mark.slow
def test_a_compiled_lightning_module(lens: Any, tmp_path: Path) -> None:
    model = seeded(PL, lens)
    path = tmp_path / "a.ckpt"
    fit(PL, torch.compile(model, backend="eager"), 1).save_checkpoint(path)
    loaded = sae_class(PL).load_from_checkpoint(path, lens=lens)
    assert torch.equal(loaded.sae.encoder.weight, model.sae.encoder.weight)


def test_a_compiled_lean_model(lens: Any, checkpoint: Path) -> None:
    compiled = torch.compile(copy.deepcopy(lens), backend="eager")
    model = sae_class(PL).load_from_checkpoint(checkpoint, lens=compiled)
    assert set(model.state_dict()) == set(seeded(PL, lens).state_dict())
    saved: dict[str, Any] = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(saved)
    record = saved[RECORD_KEY]["submodules"]["lens"]
    assert list(record["loads"]) == [""]
    seeded(PL, lens).on_load_checkpoint(saved)


@both
@pytest.mark.parametrize("quantize", [None, "8bit"])
def test_copies(package: str, quantize: str | None, tmp_path: Path) -> None:
    model = seeded(package, embedded(quantize=quantize))
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(made.state_dict()) == list(model.state_dict())
        assert not any(p.requires_grad for p in made.lens.parameters())
        path = save(package, made, tmp_path / "a.ckpt")
        model.load_state_dict(torch.load(path)["state_dict"])
        assert torch.equal(made.sae.encoder.weight, model.sae.encoder.weight)


def test_late_and_nested(lens: Any, tmp_path: Path) -> None:
    class Late(sae_class(PL)):  # type: ignore[misc]
        frozen_submodules = ("lens", "inner.part")

        def configure_model(self) -> None:
            self.inner = nn.Module()
            self.inner.part = nn.Linear(2, 2)

    made = fit(PL, Late(lens), 1)
    assert not made.lightning_module.inner.part.weight.requires_grad
    made.save_checkpoint(tmp_path / "a.ckpt")
    record = torch.load(tmp_path / "a.ckpt", weights_only=True)[RECORD_KEY]
    assert list(record["submodules"]) == ["lens", "inner.part"]
    assert record["submodules"]["inner.part"]["loads"] == {}
    with torch.no_grad():
        made.lightning_module.inner.part.weight += 1
    with pytest.raises(DifferentModelError, match=r"inner\.part differ in 1 parameters: weight"):
        made.lightning_module.on_load_checkpoint({RECORD_KEY: record})


@pytest.mark.parametrize(
    ("names", "message"), [(("lense",), "names lense, but .*lens, sae"), ("lens", r"\('lens',\)")]
)
def test_wrong_names(names: Any, message: str, lens: Any, checkpoint: Path) -> None:
    class Wrong(sae_class(PL)):  # type: ignore[misc]
        frozen_submodules = names

    def run() -> None:
        fit(PL, Wrong(lens), 1)

    with pytest.raises(ArgumentError, match=message):
        run()
    with pytest.raises(ArgumentError, match=message):
        Wrong.load_from_checkpoint(checkpoint, lens=lens)


def test_the_mixin_comes_first() -> None:
    with pytest.raises(ArgumentError, match="before Linear"):

        class Wrong(nn.Linear, FrozenSubmodulesMixin):
            pass


def run_program(name: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.support.{name}", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@both
@pytest.mark.parametrize("quantize", ["none", "8bit"])
def test_two_processes(package: str, quantize: str, tmp_path: Path) -> None:
    run_program("lightning_ddp", package, quantize, str(tmp_path))
    results = [torch.load(tmp_path / f"result-{rank}.pt", weights_only=True) for rank in range(2)]
    for result in results:
        assert len(result["whole"]) == 6
        assert [*result["first"], *result["second"]] == result["whole"]
        assert result["refused"]
    assert results[0]["whole"] != results[1]["whole"]  # each has its own half of the data
    for name, tensor in results[0]["state"].items():
        assert torch.equal(tensor, results[1]["state"][name])
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert all(key.startswith("sae.") for key in content["state_dict"])


@pytest.mark.slow
@pytest.mark.skipif(compat.why_no_shards() is not None, reason="this torch cannot share models")
def test_two_processes_resume_beside_a_sharded_lens(tmp_path: Path) -> None:
    run_program("lightning_sharded", str(tmp_path))
    for rank in range(2):
        whole, resumed = torch.load(tmp_path / f"losses-{rank}.pt", weights_only=True)
        assert resumed == whole[-len(resumed) :]
    files = [file.stat().st_size for file in (tmp_path / "one.ckpt").rglob("*") if file.is_file()]
    assert sum(files) < 400_000  # the lens is 1.8 MB
