"""Lightning checkpoints know which pretrained model they were trained beside."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import zoo as bed
from tests.support.comparison import lean_model
from tests.support.lightning_modules import PACKAGES, Sae, edited, embedded, fit, sae_class, seeded
from tests.support.reference import NO_PROCESSING
from tl_fastload import CheckpointError, DifferentModelError, LeanLoadError
from tl_fastload.lightning import RECORD_KEY, FrozenSubmodulesMixin

PL = PACKAGES[0]


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
