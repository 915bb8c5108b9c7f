"""A bridge as the frozen part of a Lightning module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.bridge_stock import quiet
from tests.support.lightning_modules import PACKAGES, fit, sae_class, save, seeded
from tl_fastload import ArgumentError, DifferentModelError, LeanTransformerBridge
from tl_fastload.embedded_model import embedded_model_path
from tl_fastload.lightning import RECORD_KEY

PL = PACKAGES[0]


def bridge(**arguments: Any) -> Any:
    with quiet():
        return LeanTransformerBridge.from_pretrained_lean(
            embedded_model_path(), device="cpu", progress=False, **arguments
        )


def test_a_bridge_is_frozen_left_out_and_known_again(tmp_path: Path) -> None:
    whole = seeded(PL, bridge())
    fit(PL, whole, 2)
    first = seeded(PL, bridge())
    before = {name: p.clone() for name, p in first.lens.named_parameters()}
    path = save(PL, first, tmp_path / "one.ckpt")
    assert first.modes == [(False, True)] * 4
    assert not any(p.requires_grad for p in first.lens.parameters())
    assert all(torch.equal(p, before[name]) for name, p in first.lens.named_parameters())
    content = torch.load(path, weights_only=True)
    names = [f"sae.{part}.{leaf}" for part in ("encoder", "decoder") for leaf in ("weight", "bias")]
    assert list(content["state_dict"]) == names
    trained_bytes = sum(tensor.nbytes for tensor in content["state_dict"].values())
    assert path.stat().st_size < 3 * trained_bytes + 40_000
    load = content[RECORD_KEY]["submodules"]["lens"]["loads"][""]
    assert load["source"] == first.lens.load_report.source
    assert "fold_ln" in load["processing"]
    second = sae_class(PL)(bridge())
    counts = [parameter._version for parameter in second.lens.parameters()]
    fit(PL, second, 2, path)
    assert counts == [parameter._version for parameter in second.lens.parameters()]
    assert [*first.losses, *second.losses] == whole.losses
    for ours, theirs in zip(second.sae.parameters(), whole.sae.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_bridge_is_refused(tmp_path: Path) -> None:
    model = seeded(PL, bridge())
    made = fit(PL, model, 1)
    path = tmp_path / "a.ckpt"
    made.save_checkpoint(path)
    edited = bridge()
    with torch.no_grad():
        edited.blocks[0].mlp.out.weight.mul_(1.5)
    for other, message in (
        (bridge(center_unembed=False), "processing of lens is"),
        (bridge(dtype="bfloat16"), "dtype of lens is bfloat16"),
        (edited, "weights of lens differ in"),
    ):
        with pytest.raises(DifferentModelError, match=message):
            sae_class(PL).load_from_checkpoint(path, lens=other)
    model.lens.blocks[1].attn.q.weight.requires_grad_(True)
    with pytest.raises(ArgumentError, match="trains"):
        made.save_checkpoint(tmp_path / "b.ckpt")
    assert not (tmp_path / "b.ckpt").exists()
