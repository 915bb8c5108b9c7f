"""After a load nothing of the source stays: no tensors, trees, files, and no growth."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import reference
from tests.support import zoo as bed
from tests.support.forks import in_fork
from tl_fastload import LeanHookedTransformer
from tl_fastload.errors import LeanLoadError
from tl_fastload.hooked.processing import Recorder
from tl_fastload.huggingface.pretrained import Pretrained
from tl_fastload.recipes.evaluate import Evaluation
from tl_fastload.recipes.nodes import Node, Source
from tl_fastload.recipes.promise import Promise
from tl_fastload.report.memory import host_memory, return_freed_memory
from tl_fastload.roads.road import Recording
from tl_fastload.source.reader import FileMaps, FileReader

RAW = reference.NO_PROCESSING
OURS = (Promise, Source, Node, FileReader, FileMaps, Recorder, Recording, Pretrained, Evaluation)
HOW = {
    "processed": {},
    "mapped": {**RAW, "mmap": True},
    "read": {**RAW, "mmap": False},
    "copied": {"strategy": "copy"},
    "bfloat16": {"dtype": "bfloat16"},
}


def load(source: Any, **arguments: Any) -> Any:
    return LeanHookedTransformer.from_pretrained_lean(
        source, **{"device": "cpu", "progress": False, **arguments}
    )


def alive() -> list[str]:
    """What of ours is alive, reachable or not."""
    # isinstance() would wake lazy modules that answer for __class__.
    return [type(thing).__name__ for thing in gc.get_objects() if issubclass(type(thing), OURS)]


@pytest.fixture(scope="module", autouse=True)
def earlier_objects_aside() -> Iterator[None]:
    """Objects of other tests need no look in each test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # as it was (conftest.py), but for what can go


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Everything must go by reference counts: a cycle would keep weights until some collection."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def open_files(folder: Path) -> list[str]:
    links = Path("/proc/self/fd")
    if not links.exists():
        pytest.skip("needs /proc")
    targets = [str(link.readlink()) for link in links.iterdir() if link.is_symlink()]
    return [target for target in targets if target.startswith(str(folder))]


def mapped_files(folder: Path) -> list[str]:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in maps if str(folder) in line]


OTHERS = ("llama-gqa1-tied", "mixtral", "qwen", "othello")
CASES_AND_ROADS = [("gpt2", how) for how in HOW] + [
    (case_id, list(HOW)[(number + step) % len(HOW)])
    for number, case_id in enumerate(OTHERS)
    for step in range(2)
]


@pytest.mark.parametrize(("case_id", "how"), CASES_AND_ROADS)
def test_nothing_of_ours_survives(case_id: str, how: str, zoo: Any, no_collector: None) -> None:
    folder = zoo(case_id)
    before, opened = alive(), open_files(folder)  # by other tests in this process
    model = load(folder, **HOW[how])
    assert alive() == before
    assert model._recorder is None
    assert open_files(folder) == opened
    if not model.load_report.mapped_bytes:
        assert mapped_files(folder) == []
    if how == "read":
        assert not model.load_report.mapped_bytes


def test_torch_files_are_let_go(zoo: Any, no_collector: None) -> None:
    folder = zoo("gpt2", bin=True)
    before = alive()
    model = load(folder)
    assert alive() == before
    assert open_files(folder) == mapped_files(folder) == []
    assert model.W_E.shape == (model.cfg.d_vocab, model.cfg.d_model)


@pytest.mark.parametrize("how", ["processed", "read", "copied"])
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa1-tied", "mixtral"])
def test_the_callers_model_can_go(case_id: str, how: str, zoo: Any, no_collector: None) -> None:
    source = reference.hf_model(case_id, zoo(case_id))
    module, weight = weakref.ref(source), weakref.ref(next(source.parameters()))
    model = load(zoo(case_id), hf_model=source, **HOW[how])
    assert alive() == []
    references = gc.get_referrers(next(source.parameters()))
    assert not any(isinstance(thing, LeanHookedTransformer) for thing in references)
    del source, references
    gc.collect()  # transformers' modules refer to one another
    assert module() is None
    assert weight() is None
    assert model.W_E is not None


def test_the_model_itself_can_go(zoo: Any) -> None:
    folder = zoo("gpt2")
    model = load(folder, **HOW["mapped"])
    assert model.load_report.mapped_bytes
    assert mapped_files(folder)
    reference_ = weakref.ref(model)
    del model
    gc.collect()
    assert reference_() is None
    assert mapped_files(folder) == []


def test_a_processing_in_place_leaves_nothing(zoo: Any, no_collector: None) -> None:
    model = load(zoo("gpt2"), **RAW)
    before = alive()
    model.process_weights_()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_and_process_state_dict(state, **RAW)
    assert alive() == before
    assert model._recorder is None


def test_a_load_that_fails_leaves_nothing(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("llama")
    shutil.copytree(folder, tmp_path / "broken")
    path = tmp_path / "broken" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": 5}))
    gc.collect()
    before = alive()
    for _ in range(2):
        with pytest.raises(LeanLoadError):
            load(tmp_path / "broken")
        assert open_files(tmp_path) == []
    gc.collect()
    assert alive() == before


def test_a_failed_load_into_a_model_leaves_it_usable(zoo: Any) -> None:
    model = load(zoo("gpt2"), **RAW)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value.clone() for name, value in before.items()}
    state["embed.W_E"] = torch.zeros(3, 3)
    with pytest.raises(LeanLoadError, match=r"embed\.W_E.*\(3, 3\)"):
        model.load_and_process_state_dict(state)
    del state["embed.W_E"]
    with pytest.raises(LeanLoadError, match=r"embed\.W_E"):
        model.load_and_process_state_dict(state)
    assert model._recorder is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def growth_of_ten_loads(folder: Path) -> tuple[int, int]:
    """Of objects and bytes, after three loads that bring in what the libraries keep."""

    def load_twice() -> None:
        load(folder)
        assert load(folder, **HOW["mapped"]).load_report.mapped_bytes

    def settled() -> tuple[int, int]:
        gc.collect()
        return_freed_memory()
        return len(gc.get_objects()), host_memory().anonymous_bytes

    for _ in range(3):
        load_twice()
    objects, size = settled()
    for _ in range(10):
        load_twice()
    more_objects, more_size = settled()
    return more_objects - objects, more_size - size


def test_ten_loads_do_not_grow(zoo: Any) -> None:
    folder = zoo("llama", hidden_size=120, intermediate_size=1200, vocab_size=2000)
    parameter_bytes = sum(t.nbytes for t in bed.read_weights(folder).values())
    objects, size = in_fork(lambda: growth_of_ten_loads(folder))
    assert objects < 100
    # A leak would be at least one model per load; the heap itself breathes by less than one.
    assert size < 3 * parameter_bytes


@pytest.mark.parametrize("how", HOW)
def test_copies_and_saves(how: str, zoo: Any) -> None:
    model = load(zoo("llama-gqa1-tied"), **HOW[how])
    tokens = bed.tokens("llama-gqa1-tied")
    expected = model(tokens)
    twin = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    for other in (twin, pickled):
        assert type(other) is LeanHookedTransformer
        assert torch.equal(other(tokens), expected)
        assert other.load_report == model.load_report
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("how", HOW)
def test_a_saved_state_dict_loads_and_is_not_larger_than_the_model(how: str, zoo: Any) -> None:
    model = load(zoo("llama-gqa1-tied"), **HOW[how])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    state_bytes = sum(value.nbytes for value in model.state_dict().values())
    assert file.tell() < 1.3 * state_bytes + 40_000
    file.seek(0)
    other = load(zoo("llama-gqa1-tied"), **HOW[how])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    missing = other.load_state_dict(torch.load(file, weights_only=True))
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_mapped_part_of_a_model_is_saved_as_that_part(zoo: Any) -> None:
    """Saving a view saves its whole storage: that must not be the whole checkpoint file."""
    folder = zoo("llama", hidden_size=120, intermediate_size=1200, vocab_size=2000)
    model = load(folder, first_n_layers=0, mmap=True, **RAW)
    file = io.BytesIO()
    torch.save({"W_E": model.embed.W_E}, file)
    assert file.tell() < 1.5 * model.embed.W_E.nbytes
