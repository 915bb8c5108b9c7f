"""Checkpoints of Lightning modules beside a frozen lean model, with real Trainers."""

from __future__ import annotations

import copy
import importlib
import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from tests.support.lightning_modules import (
    PACKAGES,
    data,
    edited,
    embedded,
    fit,
    sae_class,
    save,
    seeded,
    trainer,
)
from tests.support.reference import NO_PROCESSING
from tl_fastload import ArgumentError, MissingWeightsError
from tl_fastload.lightning import RECORD_KEY

PL = PACKAGES[0]
both = pytest.mark.parametrize("package", PACKAGES)


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

    from tests.support.lightning_modules import data, trainer

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


# Training of what is frozen


def _head_only(self: Any) -> Any:
    return torch.optim.SGD(self.sae.parameters(), lr=1e-2)


def test_a_backbone_that_was_unfrozen_in_between(lens: Any, tmp_path: Path) -> None:
    """A validation loop puts the module into train mode again, which freezes what is frozen."""
    callbacks = importlib.import_module(f"{PL}.callbacks")
    finetuning = callbacks.BackboneFinetuning(1, backbone_initial_lr=1e-2, initial_denom_lr=1.0)

    class Tuned(sae_class(PL)):  # type: ignore[misc]
        configure_optimizers = _head_only

        @property
        def backbone(self) -> Any:  # the callback's name for it
            return self.lens

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            out, _ = self.sae(self.lens(batch[0], stop_at_layer=1))
            return out.square().mean()

        def validation_step(self, batch: Any, index: int) -> None:
            pass

    model = Tuned(copy.deepcopy(lens))
    made = trainer(PL, 2, callbacks=[finetuning])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(model, data(), data())
    assert not torch.equal(model.lens.W_E, lens.W_E)
    assert not any(parameter.requires_grad for parameter in model.lens.parameters())
    with pytest.raises(ArgumentError, match=r"lens\..*has changed since it was attached"):
        made.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ArgumentError, match="has changed since"):
        fit(PL, model, 1)  # before a second run is lost, too
    with pytest.raises(ArgumentError, match="has changed since"):
        copy.deepcopy(model).on_save_checkpoint({})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.frozen_submodules = ()
        made.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["lens.embed.W_E"], model.lens.W_E)


def _step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Train a part of the frozen model by hand, and freeze it again."""
    model.lens.embed.requires_grad_(True)
    model.lens(data().dataset[:2][0], return_type="loss").backward()
    optimizer.step()
    optimizer.zero_grad()
    model.lens.embed.requires_grad_(False)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_by_hand_is_told(optimizer: Any, lens: Any) -> None:
    model = seeded(PL, copy.deepcopy(lens))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.state_dict()
        model.on_save_checkpoint({})
    _step(model, optimizer(model.lens.embed.parameters(), lr=1.0))
    with pytest.warns(UserWarning, match="has changed since it was attached|has been written to"):
        model.state_dict()
    if optimizer is torch.optim.AdamW:  # changes every value, also of rows without a gradient
        with pytest.raises(ArgumentError, match=r"lens.embed.W_E of .* has changed"):
            model.on_save_checkpoint({})
    model.lens = model.lens  # said on purpose
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.state_dict()
        model.on_save_checkpoint({})


def test_what_leaves_the_values_alone_is_no_training(lens: Any) -> None:
    model = seeded(PL, copy.deepcopy(lens))
    model.lens.run_with_cache(torch.zeros(1, 4, dtype=torch.long))
    model.to(torch.bfloat16)  # `Trainer(precision="bf16-true")`
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.on_save_checkpoint({})
    with torch.no_grad():  # as averages of weights put back what they have averaged
        for parameter in model.lens.parameters():
            parameter.copy_(parameter.clone())
    with pytest.warns(UserWarning, match="has been written to"):
        model.on_save_checkpoint({})
    model.lens.blocks[0].mlp.W_in.data.mul_(1.5)
    with pytest.raises(ArgumentError, match=r"lens.blocks.0.mlp.W_in of .* has changed"):
        model.on_save_checkpoint({})


def test_a_frozen_part_without_values_here(lens: Any) -> None:
    model = seeded(PL, copy.deepcopy(lens))
    model.lens = accelerate.cpu_offload(model.lens, execution_device=torch.device("cpu"))
    with pytest.raises(ArgumentError, match=r"embed\.W_E is on the meta.*remove_hook_from_sub"):
        model.on_save_checkpoint({})
