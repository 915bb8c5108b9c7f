"""Prefixes of wrappers: taken off where the rest fits, and nowhere else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.support import zoo as bed
from tests.support.comparison import lean_model
from tl_fastload import LeanHookedTransformer, MissingWeightsError, load_weights_
from tl_fastload.ground.wrappers import named_as, unwrapped, without_prefixes, without_wrappers

WANTED = ("embed.W_E", "blocks.0.attn.W_Q", "blocks.0.attn.W_K")
RAW = {
    "fold_ln": False,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
}


def renamed(keys: list[str]) -> dict[str, str]:
    found = without_prefixes(keys, lambda name: name if name in WANTED else None)
    return {found.names.get(key, key): key for key in keys}


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "lens.",
        "model.lens._orig_mod.",
    ],
)
def test_a_prefix_of_all_or_some_keys(prefix: str) -> None:
    assert set(renamed([prefix + name for name in WANTED])) == set(WANTED)
    some = [prefix + WANTED[0], *WANTED[1:]]
    assert set(renamed(some)) == set(WANTED)
    notes = without_prefixes(some, lambda name: name if name in WANTED else None).notes
    assert len(notes) == 1
    assert repr(prefix) in notes[0]
    assert "1 key " in notes[0]


def test_a_compiled_block_inside() -> None:
    keys = ["embed.W_E", "blocks.0._orig_mod.attn.W_Q", "lens.blocks.0.module.attn.W_K"]
    assert set(renamed(keys)) == set(WANTED)


def test_what_fits_as_it_is_stays() -> None:
    module = ("module.a", "a")
    found = without_prefixes(module, lambda name: name if name in module else None)
    assert not found.names
    assert not found.notes
    assert not found.ambiguous


def test_what_fits_nowhere_stays() -> None:
    keys = ["module.embed.W_E", "module.probe.weight", "epoch"]
    assert set(renamed(keys)) == {"embed.W_E", "module.probe.weight", "epoch"}


def test_beside_the_bare_key_a_second_one_is_unexpected() -> None:
    keys = [*WANTED, *(f"ema.{name}" for name in WANTED)]
    assert set(renamed(keys)) == set(keys)


@pytest.mark.parametrize(
    "keys",
    [
        ["student.embed.W_E", "teacher.embed.W_E"],
        ["student.embed.W_E", "teacher.blocks.0.attn.W_Q"],
        ["_orig_mod.embed.W_E", "module.embed.W_E"],
    ],
)
def test_two_ways_are_none(keys: list[str]) -> None:
    found = without_prefixes(keys, lambda name: name if name in WANTED else None)
    assert not found.names
    assert found.ambiguous


def test_wrappers_alone() -> None:
    assert without_wrappers(["module._orig_mod.a", "module.b"]).names == {
        "module._orig_mod.a": "_orig_mod.a",
        "module.b": "b",
    }
    assert not without_wrappers(["module.a", "b"]).names
    assert not without_wrappers([]).names


def test_a_compiled_submodule_of_the_model(zoo: Any) -> None:
    model = lean_model(zoo("gpt2"))
    bare = dict(model.state_dict())
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    assert any("_orig_mod" in name for name in model.state_dict())
    for state in (bare, dict(model.state_dict())):
        named, renaming = named_as(model, state)
        assert set(named) == set(bare)
        assert not renaming.notes
    changed = {
        name: value + 1 if value.is_floating_point() else value for name, value in bare.items()
    }
    load_weights_(model, changed)
    assert torch.equal(
        model.state_dict()["blocks.0._orig_mod.attn.W_Q"], changed["blocks.0.attn.W_Q"]
    )


class Parallel(nn.parallel.DistributedDataParallel):
    """As DistributedDataParallel, but without processes."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "distributed": Parallel,
    "compiled in parallel": lambda model: Parallel(torch.compile(model, backend="eager")),
    "parallel in compiled": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("how", WRAPPERS)
def test_the_original_of_a_wrapped_model(how: str) -> None:
    model = nn.Linear(2, 2)
    assert unwrapped(WRAPPERS[how](model)) is model
    assert unwrapped(model) is model
    assert unwrapped("module") == "module"


@pytest.mark.parametrize("how", WRAPPERS)
def test_wrapped_models_and_their_state_dicts(how: str, zoo: Any) -> None:
    """The model that is loaded into, and the one that the weights come from."""
    source, model = lean_model(zoo("gpt2")), lean_model(zoo("gpt2"))
    with torch.no_grad():
        for number, parameter in enumerate(source.parameters()):
            parameter.fill_(number + 1)
    report = load_weights_(WRAPPERS[how](model), WRAPPERS[how](source).state_dict())
    assert model.load_report is report
    assert "was taken off" in report.notes[0]
    expected = source.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.lens._orig_mod."])
def test_load_and_process_state_dict(prefix: str, zoo: Any) -> None:
    raw = lean_model(zoo("gpt2"), **RAW)
    state = {prefix + name: value for name, value in raw.state_dict().items()}
    model, expected = lean_model(zoo("gpt2"), **RAW), lean_model(zoo("gpt2"), **RAW)
    expected.load_and_process_state_dict(raw.state_dict())
    model.load_and_process_state_dict(state)
    assert repr(prefix) in " ".join(model.load_report.notes)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    # Into norms that are folded: their weights fit, too.
    model.load_and_process_state_dict(state)
    assert torch.equal(model.W_Q, expected.W_Q)
    two = {**state, **{f"other.{name}": value for name, value in raw.state_dict().items()}}
    with pytest.raises(MissingWeightsError, match="would both be"):
        model.load_and_process_state_dict(two)
    assert torch.equal(model.W_Q, expected.W_Q)


def with_prefix(
    folder: Path, to: Path, change: Callable[[str], str], bin: bool, shards: int = 1
) -> Path:
    """A checkpoint whose keys are changed."""
    to.mkdir()
    (to / "config.json").write_text((folder / "config.json").read_text())
    tensors = {change(name): value for name, value in bed.read_weights(folder).items()}
    bed.write_weights(to, tensors, bin=bin, shards=shards)
    return to


WAYS = [("_orig_mod.", False), ("module._orig_mod.", True), ("net.lm.", False)]


# Nobody knows the names of models whose code lies in the checkpoint, as that of Qwen 1 does.
@pytest.mark.parametrize(
    ("case_id", "prefix", "bin"),
    [(c, *way) for c in ("gpt2-hub", "llama-gqa", "mixtral") for way in WAYS]
    + [("qwen", *way) for way in WAYS[:2]],
)
def test_a_checkpoint_with_prefixes(
    case_id: str, prefix: str, bin: bool, zoo: Any, tmp_path: Path
) -> None:
    shards = 3 if prefix == "_orig_mod." else 1
    wrapped = tmp_path / "wrapped"
    folder = with_prefix(zoo(case_id), wrapped, lambda name: prefix + name, bin, shards)
    model, expected = lean_model(folder), lean_model(zoo(case_id))
    assert any("was taken off" in note for note in model.load_report.notes)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_some_keys_of_a_checkpoint(zoo: Any, tmp_path: Path) -> None:
    """As `model.layers[i] = torch.compile(model.layers[i])` saves them."""

    def change(name: str) -> str:
        return name.replace("layers.1.", "layers.1._orig_mod.")

    folder = with_prefix(zoo("llama-gqa"), tmp_path / "wrapped", change, False)
    model, expected = lean_model(folder), lean_model(zoo("llama-gqa"))
    assert any("_orig_mod." in note for note in model.load_report.notes)
    assert torch.equal(model.W_Q, expected.W_Q)


def test_two_models_in_one_checkpoint(zoo: Any, tmp_path: Path) -> None:
    folder = with_prefix(zoo("llama-gqa"), tmp_path / "wrapped", lambda name: f"a.{name}", False)
    tensors = bed.read_weights(folder)
    tensors.update({name.replace("a.", "b.", 1): value.clone() for name, value in tensors.items()})
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(MissingWeightsError, match=r"unexpected: b\."):
        lean_model(folder)


@pytest.mark.parametrize("case_id", ["llama-gqa1-tied", "gpt2"])
@pytest.mark.parametrize(
    "head", ["mtp.lm_head.weight", "model.layers.2.shared_head.lm_head.weight"]
)
def test_an_auxiliary_head_of_a_tied_model(
    case_id: str, head: str, zoo: Any, tmp_path: Path
) -> None:
    """It is not the model's own, which the embedding is."""
    folder = with_prefix(zoo(case_id), tmp_path / "more", lambda name: name, False)
    tensors = bed.read_weights(folder)
    rows = next(v for k, v in tensors.items() if k.endswith(("embed_tokens.weight", "wte.weight")))
    tensors[head] = torch.randn_like(rows)
    model = lean_model(zoo(case_id))
    with pytest.raises(MissingWeightsError, match=re.escape(head)):
        load_weights_(model, tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(MissingWeightsError, match="unexpected: " + re.escape(head)):
        lean_model(folder)


def test_a_toy_model_with_prefixes(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("gelu")
    copy = tmp_path / folder.name
    copy.mkdir()
    (copy / "config.json").write_text((folder / "config.json").read_text())
    weights = next(path for path in folder.glob("*final.pth"))
    state = torch.load(weights, weights_only=True)
    torch.save({f"module.{k}": v for k, v in state.items()}, copy / weights.name)
    model = lean_model(copy)
    assert json.loads((copy / "config.json").read_text())
    assert any("'module.'" in note for note in model.load_report.notes)
    assert torch.equal(model.W_E, lean_model(folder).W_E)


def test_a_compiled_hf_model(zoo: Any) -> None:
    from tests.support import reference

    folder = zoo("llama-gqa")
    source = torch.compile(reference.hf_model("llama-gqa", folder), backend="eager")
    model = LeanHookedTransformer.from_pretrained_lean(
        folder, hf_model=source, device="cpu", progress=False
    )
    assert torch.equal(model.W_Q, lean_model(folder).W_Q)
