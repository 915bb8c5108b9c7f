"""`load_weights_` where something is wrong: all of it is told, and the model is as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer

from tests.support.comparison import changed, lean_model, values
from tests.support.written_weights import RAW, other_values, written
from tl_fastload import (
    ArgumentError,
    CheckpointError,
    LeanHookedTransformer,
    MissingWeightsError,
    load_weights_,
)


@pytest.fixture
def model(zoo: Any) -> LeanHookedTransformer:
    return lean_model(zoo("gpt2"))


def test_everything_wrong_is_told_at_once(model: Any) -> None:
    before, state = values(model), other_values(model)
    del state["blocks.0.attn.W_O"], state["embed.W_E"]
    state["blocks.0.attn.W_X"] = torch.ones(2)
    state["blocks.1.mlp.W_in"] = torch.ones(3, 5)
    state["blocks.1.mlp.b_in"] = state["blocks.1.mlp.b_in"].to(torch.int8)
    state["unembed.W_U"] = state["unembed.W_U"].to_sparse()
    wrong: dict[str, Any] = {**state, "epoch": 7}
    with pytest.raises(MissingWeightsError) as error:
        load_weights_(model, wrong)
    for line in (
        "missing: blocks.0.attn.W_O",
        "missing: embed.W_E",
        "unexpected: blocks.0.attn.W_X",
        "unexpected: epoch (it is a int",
        "misshapen: blocks.1.mlp.W_in is (3, 5), the model has",
        "not weights: blocks.1.mlp.b_in holds torch.int8",
        "unembed.W_U (it is sparse",
    ):
        assert line in str(error.value), line
    assert not changed(before, model)
    with pytest.raises(MissingWeightsError, match=r"not usable: unembed.W_U") as error:
        load_weights_(model, wrong, strict=False)
    assert "missing:" not in str(error.value)
    assert not changed(before, model)


def test_nothing_that_fits_is_an_error(model: Any) -> None:
    with pytest.raises(ArgumentError, match="pass config="):
        load_weights_(_without_config(model), {"a.b": torch.ones(1)}, strict=False)
    with pytest.raises(MissingWeightsError, match="missing: embed"):
        load_weights_(model, {})
    assert load_weights_(model, {}, strict=False).missing_keys


def test_two_models_in_one_state_dict(model: Any) -> None:
    before, state = values(model), other_values(model)
    two = {f"{who}.{name}": v for who in ("student", "teacher") for name, v in state.items()}
    for strict in (True, False):
        with pytest.raises(
            MissingWeightsError, match=r"'student\..* and 'teacher\..* would both be"
        ):
            load_weights_(model, two, strict=strict)
    assert not changed(before, model)


def _without_config(model: Any) -> Any:
    model._hf_config = None
    return model


def test_processed_and_unprocessed_weights_are_told_apart(model: Any, zoo: Any) -> None:
    raw = lean_model(zoo("gpt2"), **RAW)
    with pytest.raises(MissingWeightsError, match="load_and_process_state_dict"):
        load_weights_(model, raw.state_dict())
    with pytest.raises(MissingWeightsError, match="seem to come from a processed model"):
        load_weights_(raw, model.state_dict())
    with pytest.raises(ArgumentError, match="go in as they are"):
        load_weights_(model, model.state_dict(), processing={"center_unembed": True})


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_truncated_file_changes_nothing(cut: int, model: Any, tmp_path: Path) -> None:
    before = values(model)
    for how in ("safetensors file", "torch file"):
        path = Path(written(how, other_values(model), tmp_path))
        os.truncate(path, path.stat().st_size - cut)
        with pytest.raises(CheckpointError, match=path.name):
            load_weights_(model, path)
        assert not changed(before, model)


@pytest.mark.parametrize("after", [0, 1, 7, 20])
def test_a_read_that_fails_changes_nothing(
    after: int, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever read it is: every byte is read before the first is written."""
    from tl_fastload.source import reader

    before = values(model)
    path = written("safetensors file", other_values(model), tmp_path)
    read, calls = reader._read_at, []

    def fails(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(5, "Input/output error")
        return read(*arguments)

    monkeypatch.setattr(reader, "_read_at", fails)
    with pytest.raises(CheckpointError, match="Input/output error"):
        load_weights_(model, path)
    assert len(calls) == after + 1
    assert not changed(before, model)


def test_a_file_that_is_cut_while_it_is_put_in_place(model: Any, tmp_path: Path) -> None:
    """The one fault that leaves a mixture; the error says so."""
    path = written("safetensors file", other_values(model), tmp_path)

    def cut(event: Any) -> None:
        os.truncate(path, 2000)

    with pytest.raises(CheckpointError, match=r"not as it was: .*hold new values"):
        load_weights_(model, path, progress=cut)


def test_files_that_are_none(model: Any, tmp_path: Path) -> None:
    before = values(model)
    (tmp_path / "empty").mkdir()
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "text.safetensors").write_text("weights")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "tl_fastload.json").write_text("{}")
    (copy / "weights-1.safetensors").touch()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"embed.W_E": "gone.safetensors"}}))
    for source, kind, message in (
        (tmp_path / "nowhere", ArgumentError, "no file or folder"),
        (tmp_path / "empty", CheckpointError, "no weights"),
        (tmp_path / "module.pt", CheckpointError, "never run"),
        (tmp_path / "text.safetensors", CheckpointError, "not a safetensors file"),
        (index, CheckpointError, "gone.safetensors"),
        (copy / "weights-1.safetensors", ArgumentError, "part of a processed copy"),
        (copy, CheckpointError, "does not describe a processed copy"),
        (7, ArgumentError, "cannot come from a int"),
    ):
        with pytest.raises(kind, match=message):
            load_weights_(model, source)
    assert not changed(before, model)


def test_models_that_are_none(model: Any) -> None:
    with pytest.raises(ArgumentError, match="not with a Linear"):
        load_weights_(torch.nn.Linear(2, 2), model.state_dict())
    with torch.device("meta"):
        empty = HookedTransformer(model.cfg, move_to_device=False)
    with pytest.raises(ArgumentError, match=r"embed\.W_E is on the meta device"):
        load_weights_(empty, model.state_dict())
