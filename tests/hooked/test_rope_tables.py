"""Rotary tables that are transformers' own, on every road to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import reference
from tests.support.comparison import lean_model
from tl_fastload import NumbersWarning, load_weights_, plan
from tl_fastload.hooked.config_rope import functions

pytestmark = pytest.mark.skipif(not functions(), reason="this transformers has no such functions")
IDS = torch.arange(3, 29)[None]
LONG = {"n_ctx": 29}


@pytest.fixture(scope="module")
def folder(zoo: Any) -> Path:
    return zoo(
        "phi3",
        rope_scaling={
            "rope_type": "longrope",
            "short_factor": [1.0, 1.5, 2.0],
            "long_factor": [2.0, 3.0, 5.0],
        },
        original_max_position_embeddings=16,
    )


def _off(model: Any, folder: Path, tokens: int) -> float:
    hf_model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    ids = IDS[:, :tokens]
    with torch.no_grad():
        wanted = reference.log_probs(hf_model.eval()(ids).logits)
        return float((model(ids).log_softmax(-1) - wanted).abs().max())


def test_up_to_the_context_of_pre_training_by_default(folder: Path) -> None:
    lean = lean_model(folder)
    assert _off(lean, folder, 16) < 1e-4
    with pytest.raises(RuntimeError):  # nothing is computed with tables of another length
        lean(IDS[:, :17])
    assert any("takes the short factors" in note for note in lean.load_report.notes)


def test_long_inputs_on_every_road(folder: Path, tmp_path: Path) -> None:
    with pytest.warns(NumbersWarning, match="load with n_ctx=16 for these") as told:
        lean = lean_model(folder, **LONG)
    assert [text.filename for text in told if text.category is NumbersWarning] == [
        lean_model.__code__.co_filename
    ]
    lean.save_lean(tmp_path / "copy")
    raw = lean_model(folder, **LONG, **reference.NO_PROCESSING)
    raw.process_weights_()
    load_weights_(raw, folder)
    models = [lean, raw]
    for strategy in ("assign", "copy"):
        with pytest.warns(NumbersWarning, match="takes the long factors"):
            models.append(lean_model(tmp_path / "copy", strategy=strategy))
    for _ in range(2):  # fills the cache, and is served from it
        with pytest.warns(NumbersWarning, match="takes the long factors"):
            models.append(lean_model(folder, cache=tmp_path / "cache", **LONG))
    for model in models:
        assert _off(model, folder, 26) < 1e-4
        assert model.blocks[0].attn.rotary_sin.shape[0] == 29
    assert any("takes the long factors" in note for note in plan(folder, **LONG).notes)
