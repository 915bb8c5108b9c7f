"""Checkpoints of Lightning modules beside a frozen lean model, with real Trainers."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo as bed
from comparison import lean_model
from lightning_modules import PACKAGES, Sae, embedded, fit, sae_class, seeded
from reference import NO_PROCESSING
from torch import nn

from tl_fastload import (
    ArgumentError,
    CheckpointError,
    DifferentModelError,
    LeanLoadError,
    MissingWeightsError,
)
from tl_fastload.lightning import RECORD_KEY, FrozenSubmodulesMixin

PL = PACKAGES[0]
both = pytest.mark.parametrize("package", PACKAGES)


@pytest.fixture(scope="module")
def lens() -> Any:
    """Treat it as read-only."""
    return embedded()


def save(package: str, model: Any, path: Path, epochs: int = 1) -> Path:
    fit(package, model, epochs).save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(lens: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch beside the processed, embedded model."""
    return save(PL, seeded(PL, lens), tmp_path_factory.mktemp("lightning") / "one.ckpt")


def edited(path: Path, target: Path, change: Any) -> Path:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, target)
    return target


# What is saved


@both
def test_a_checkpoint_holds_what_trains(package: str, lens: Any, tmp_path: Path) -> None:
    model = seeded(package, lens)
    path = save(package, model, tmp_path / "a.ckpt")
    content = torch.load(path, weights_only=True)
    names = [f"sae.{part}.{leaf}" for part in ("encoder", "decoder") for leaf in ("weight", "bias")]
    assert list(content["state_dict"]) == names == list(model.state_dict())
    assert not any("lens" in key for key in content["state_dict"]._metadata)
    assert content["hyper_parameters"] == {"features": 64}
    trained_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    # Three copies with the optimizer's state, and a record of some kilobytes.
    assert path.stat().st_size < 3 * trained_bytes + 40_000
    record = content[RECORD_KEY]["submodules"]["lens"]["loads"][""]
    assert record["source"] == lens.load_report.source
    assert set(record) == {"source", "revision", "processing", "dtype", "quantization"}
    assert "fold_ln" in record["processing"]
    assert record["dtype"] == "float32"
    assert record["quantization"] == "none"


def test_a_model_among_the_hyperparameters_is_not_saved(lens: Any, tmp_path: Path) -> None:
    class Greedy(sae_class(PL)):  # type: ignore[misc]
        def __init__(self, lens: Any, features: int = 64) -> None:
            super().__init__(lens, features)
            self.save_hyperparameters()

    model = Greedy(lens, 32)
    assert "lens" in model.hparams
    path = save(PL, model, tmp_path / "a.ckpt")
    assert torch.load(path, weights_only=True)["hyper_parameters"] == {"features": 32}
    assert "lens" in model.hparams
    assert Greedy.load_from_checkpoint(path, lens=lens).sae.encoder.out_features == 32


def test_what_is_frozen_stays_so(lens: Any) -> None:
    model = seeded(PL, lens)
    assert not any(parameter.requires_grad for parameter in model.lens.parameters())
    before = {name: p.clone() for name, p in model.lens.named_parameters()}
    versions = {name: p._version for name, p in model.lens.named_parameters()}
    fit(PL, model, 1)
    assert model.modes == [(False, True)] * 4
    for name, parameter in model.lens.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter._version == versions[name]
    model.eval()
    assert not model.sae.training
    model.train()
    assert model.sae.training
    assert not any(module.training for module in model.lens.modules())
    model.unfreeze()  # Lightning's, of the whole module
    assert not any(parameter.requires_grad for parameter in model.lens.parameters())
    assert all(parameter.requires_grad for parameter in model.sae.parameters())


def test_what_trains_in_a_frozen_part_would_be_lost(lens: Any, tmp_path: Path) -> None:
    model = seeded(PL, copy.deepcopy(lens))
    made = fit(PL, model, 1)
    model.lens.blocks[1].attn.W_Q.requires_grad_(True)
    with pytest.raises(ArgumentError, match=r"lens.blocks.1.attn.W_Q trains"):
        made.save_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()


# Loading


@both
@pytest.mark.parametrize(
    "quantize", [None, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("8bit", "nf4"))]
)
def test_resuming_equals_an_uninterrupted_run(
    package: str, quantize: str | None, tmp_path: Path
) -> None:
    whole = seeded(package, embedded(quantize=quantize))
    fit(package, whole, 3)
    first = seeded(package, embedded(quantize=quantize))
    path = save(package, first, tmp_path / "one.ckpt")
    torch.manual_seed(5)
    second = sae_class(package)(embedded(quantize=quantize))
    assert not torch.equal(second.sae.encoder.weight, first.sae.encoder.weight)
    fit(package, second, 3, path)
    assert len(whole.losses) == 12
    assert [*first.losses, *second.losses] == whole.losses
    assert whole.losses[-1] < 0.7 * whole.losses[0]
    for ours, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@both
def test_load_from_checkpoint(package: str, lens: Any, tmp_path: Path) -> None:
    model = seeded(package, lens, features=48)
    path = save(package, model, tmp_path / "a.ckpt")
    loaded = sae_class(package).load_from_checkpoint(path, lens=lens)
    assert type(loaded) is sae_class(package)
    assert loaded.lens is lens
    for name, tensor in model.sae.state_dict().items():
        assert torch.equal(loaded.sae.state_dict()[name], tensor)
    assert not loaded.lens.training


def test_evaluation_through_the_trainer(lens: Any, checkpoint: Path) -> None:
    class Tested(sae_class(PL)):  # type: ignore[misc]
        def test_step(self, batch: Any, index: int) -> None:
            self.seen = self.sae.encoder.weight.clone()

    from lightning_modules import data, trainer

    model = Tested(lens)
    trainer(PL, 1).test(model, data(), ckpt_path=checkpoint, verbose=False)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]["sae.encoder.weight"]
    assert torch.equal(model.seen, saved)


def test_loading_never_touches_the_pretrained_part(checkpoint: Path) -> None:
    lens = embedded(mmap=True, **NO_PROCESSING)
    before = [(p.data_ptr(), p._version) for p in lens.parameters()]
    sae_class(PL).load_from_checkpoint(checkpoint, lens=lens, allow_other_frozen=True)
    assert [(p.data_ptr(), p._version) for p in lens.parameters()] == before


def _drop(content: Any) -> None:
    del content["state_dict"]["sae.encoder.weight"], content["state_dict"]["sae.decoder.bias"]


def _add(content: Any) -> None:
    content["state_dict"].update({"sae.gate": torch.ones(3), "head.weight": torch.ones(2)})


def _reshape(content: Any) -> None:
    content["state_dict"]["sae.encoder.bias"] = torch.ones(7)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (_drop, ["missing", "sae.encoder.weight", "sae.decoder.bias"]),
        (_add, ["unexpected", "sae.gate", "head.weight"]),
        (_reshape, ["shape", "sae.encoder.bias", "[7]", "[64]"]),
    ],
)
def test_keys_that_do_not_fit(
    change: Any, names: list[str], lens: Any, checkpoint: Path, tmp_path: Path
) -> None:
    path = edited(checkpoint, tmp_path / "bad.ckpt", change)
    model = seeded(PL, lens)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for load in (
        lambda: fit(PL, model, 2, path),
        lambda: sae_class(PL).load_from_checkpoint(path, lens=lens),
        lambda: model.load_state_dict(torch.load(path)["state_dict"]),
    ):
        with pytest.raises(MissingWeightsError) as caught:
            load()
        assert all(name in str(caught.value) for name in names)
        assert "lens." not in str(caught.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_not_strict_is_as_in_torch(lens: Any, checkpoint: Path, tmp_path: Path) -> None:
    path = edited(checkpoint, tmp_path / "a.ckpt", lambda content: (_drop(content), _add(content)))
    model = seeded(PL, lens)
    found = model.load_state_dict(torch.load(path)["state_dict"], strict=False)
    assert found.missing_keys == ["sae.encoder.weight", "sae.decoder.bias"]
    assert sorted(found.unexpected_keys) == ["head.weight", "sae.gate"]
    model.strict_loading = False
    fit(PL, model, 2, path)


class Translated(nn.Linear):
    """Reads a key of an older version."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}kernel" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_modules_that_translate_keys(lens: Any) -> None:
    model = seeded(PL, lens)
    model.head = Translated(2, 2)
    state = model.state_dict()
    state["head.kernel"] = torch.ones_like(state.pop("head.weight"))
    model.load_state_dict(state)
    assert bool((model.head.weight == 1).all())
    for change in (
        lambda: state.pop("head.kernel"),
        lambda: state.update({"head.kernel": torch.ones(5)}),
    ):
        change()
        with pytest.raises(MissingWeightsError, match=r"head\.(weight|kernel)"):
            model.load_state_dict(state)


# Which pretrained model it was


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "processing": (NO_PROCESSING, "processing of lens is none, was fold_ln"),
    "dtype": ({"dtype": "bfloat16"}, "dtype of lens is bfloat16, was float32"),
    "quantization": ({"quantize": "nf4"}, "quantization of lens is nf4, was none"),
    "layers": ({"first_n_layers": 1}, r"weights of lens differ in \d+ parameters: blocks\.1"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_model_is_refused(case: str, checkpoint: Path) -> None:
    arguments, message = OTHERS[case]
    other = embedded(**arguments)
    if case == "layers":
        other.add_hook = None  # never run
    model = seeded(PL, other)
    for load in (
        lambda: fit(PL, model, 2, checkpoint),
        lambda: sae_class(PL).load_from_checkpoint(checkpoint, lens=other),
    ):
        with pytest.raises(DifferentModelError, match=message) as caught:
            load()
        assert "embedded" in str(caught.value)
        assert "allow_other_frozen" in str(caught.value)
        assert isinstance(caught.value, LeanLoadError)


@pytest.mark.parametrize("size", [1e-3, 1.0])
@pytest.mark.parametrize("where", ["all", "embed.W_E"])
def test_other_weights_are_refused(size: float, where: str, checkpoint: Path) -> None:
    other = embedded()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if where in ("all", name):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                parameter += size * parameter.std() * noise
    with pytest.raises(DifferentModelError, match=r"weights of lens differ in .*embed\.W_E"):
        sae_class(PL).load_from_checkpoint(checkpoint, lens=other)


def test_another_model_when_told(checkpoint: Path) -> None:
    other = embedded(center_unembed=False)
    with pytest.warns(UserWarning, match="processing of lens is fold_ln, center_writing_weights,"):
        model = sae_class(PL).load_from_checkpoint(checkpoint, lens=other, allow_other_frozen=True)
    with pytest.raises(DifferentModelError):
        fit(PL, model, 2, checkpoint)
    model.allow_other_frozen = True
    fit(PL, model, 2, checkpoint)
    assert len(model.losses) == 4

    class Tolerant(sae_class(PL)):  # type: ignore[misc]
        allow_other_frozen = True

    with pytest.warns(UserWarning, match="another pretrained model"):
        Tolerant.load_from_checkpoint(checkpoint, lens=other)


def test_a_folder_may_move(checkpoint: Path, tmp_path: Path) -> None:
    from shutil import copytree

    from tl_fastload.embedded_model import embedded_model_path

    moved = lean_model(copytree(embedded_model_path(), tmp_path / "elsewhere"))
    sae_class(PL).load_from_checkpoint(checkpoint, lens=moved)


def test_a_half_precision_trainer_casts_after_the_checkpoint_was_read(lens: Any) -> None:
    saved: dict[str, Any] = {"state_dict": {}}
    seeded(PL, copy.deepcopy(lens)).bfloat16().on_save_checkpoint(saved)
    seeded(PL, lens).on_load_checkpoint(saved)


def test_hub_revisions(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("gpt2")
    bed.hub_cache(tmp_path, "somebody/one", folder, {"main": None, "v2": folder})
    bed.hub_cache(tmp_path, "somebody/other", folder)
    here, there, other = (
        lean_model(name, cache_dir=tmp_path, **revision)
        for name, revision in (
            ("somebody/one", {}),
            ("somebody/one", {"revision": "v2"}),
            ("somebody/other", {}),
        )
    )
    assert here.load_report.revision != there.load_report.revision
    saved: dict[str, Any] = {"state_dict": {}}
    seeded(PL, here).on_save_checkpoint(saved)
    seeded(PL, here).on_load_checkpoint(saved)
    seeded(PL, lean_model(folder)).on_load_checkpoint(saved)
    for model, name in ((there, "somebody/one@v2"), (other, "somebody/other@main")):
        with pytest.raises(
            DifferentModelError, match=f"lens comes from {name} .*somebody/one@main"
        ):
            seeded(PL, model).on_load_checkpoint(saved)


def test_a_checkpoint_without_a_record(lens: Any, checkpoint: Path, tmp_path: Path) -> None:
    path = edited(checkpoint, tmp_path / "a.ckpt", lambda content: content.pop(RECORD_KEY))
    with pytest.warns(UserWarning, match="does not say which pretrained model"):
        sae_class(PL).load_from_checkpoint(path, lens=lens)


def test_a_record_of_a_newer_version(lens: Any, checkpoint: Path, tmp_path: Path) -> None:
    path = edited(checkpoint, tmp_path / "a.ckpt", lambda c: c[RECORD_KEY].update(format=2))
    with pytest.raises(CheckpointError, match="format 2"):
        sae_class(PL).load_from_checkpoint(path, lens=lens)


# Full checkpoints, of before


class Plain(nn.Module):
    """What `Model` is without the mixin, as far as its state dict goes."""

    def __init__(self, lens: nn.Module) -> None:
        super().__init__()
        self.lens, self.sae = lens, Sae()


@pytest.mark.parametrize("quantize", [None, "8bit"])
def test_full_checkpoints(quantize: str | None, checkpoint: Path, tmp_path: Path) -> None:
    full = Plain(embedded(quantize=quantize))

    def change(content: Any) -> None:
        del content[RECORD_KEY]
        content["state_dict"] = full.state_dict()

    path = edited(checkpoint, tmp_path / "full.ckpt", change)
    lens = embedded(quantize=quantize)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = sae_class(PL).load_from_checkpoint(path, lens=lens, weights_only=False)
    assert torch.equal(loaded.sae.encoder.weight, full.sae.encoder.weight)
    other = embedded(quantize=quantize, center_writing_weights=False)
    with pytest.raises(DifferentModelError, match="weights of lens differ"):
        sae_class(PL).load_from_checkpoint(path, lens=other, weights_only=False)
    with pytest.warns(UserWarning, match="weights of lens differ"):
        sae_class(PL).load_from_checkpoint(
            path, lens=other, weights_only=False, allow_other_frozen=True
        )


# Names, wrappers, copies


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


class Tied(nn.Module):
    """Two names, one parameter, as in Hugging Face's models with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
        self.other.weight = self.one.weight


def test_a_full_checkpoint_with_tied_weights() -> None:
    class Holder(FrozenSubmodulesMixin, nn.Module):
        frozen_submodules = ("part",)

        def __init__(self) -> None:
            super().__init__()
            self.part, self.head = Tied(), nn.Linear(2, 2)

    holder = Holder()
    full = nn.Module.state_dict(holder)
    assert {"part.one.weight", "part.other.weight"} < set(full)
    holder.load_state_dict(full)


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


# Two processes


@pytest.mark.slow
@both
@pytest.mark.parametrize("quantize", ["none", "8bit"])
def test_two_processes(package: str, quantize: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("lightning_ddp.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), package, quantize, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
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
