"""Steps in place that are interrupted: undone, done, or told by every later use."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.comparison import changed, lean_model, values
from tests.support.written_weights import RAW, other_values, written
from tl_fastload import (
    HalfWrittenError,
    LeanHookedTransformer,
    NotEnoughMemory,
    load_weights_,
    save_lean,
)
from tl_fastload.ground.mark import is_half_written
from tl_fastload.lightning.record import record_of
from tl_fastload.report.memory_map import memory_map

ROADS = (
    "process_weights_",
    "load_and_process_state_dict",
    "load_weights_, own names",
    "load_weights_, Hugging Face's names",
)
# A weak reference's callback is no place for an interrupt to go on from.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
Action = Callable[[LeanHookedTransformer], Any]


def calls_of(action: Callable[[], Any], stop_at: int = 0) -> int:
    """Python calls until the action ended, with a KeyboardInterrupt at the given one."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"
        if event == "call" and count == stop_at:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return count


def actions(model: Any, hf: Any, folder: Path) -> dict[str, Action]:
    """Every road that writes into a live model."""
    state = other_values(model)
    path = written("safetensors file", state, folder)
    roads: list[Action] = [
        lambda model: model.process_weights_(),
        lambda model: model.load_and_process_state_dict(state),
        lambda model: load_weights_(model, path),
        lambda model: load_weights_(model, hf),
    ]
    return dict(zip(ROADS, roads, strict=True))


@pytest.fixture(scope="module")
def raw(zoo: Any) -> Any:
    """An unprocessed model; copied before it is written to."""
    return lean_model(zoo("gpt2"), **RAW)


@pytest.fixture(scope="module")
def hf(zoo: Any) -> dict[str, torch.Tensor]:
    """Other weights for it, in Hugging Face's naming."""
    from transformers import AutoModelForCausalLM

    weights = AutoModelForCausalLM.from_pretrained(zoo("gpt2")).state_dict()
    return {name: tensor * 1.25 for name, tensor in weights.items()}


def check_refusals(model: Any, folder: Path) -> None:
    """Every later use of a half-written model refuses."""
    own = model.state_dict()
    uses: list[Callable[[], Any]] = [
        model.process_weights_,
        lambda: model.load_and_process_state_dict(own),
        lambda: load_weights_(model, own),
        lambda: load_weights_(model, {"embed.W_E": own["embed.W_E"].clone()}, strict=False),
        lambda: save_lean(model, folder / "copy"),
        lambda: record_of({"lens": model}),
        lambda: memory_map(model),
    ]
    before = values(model)
    for use in uses:
        with pytest.raises(HalfWrittenError, match=r"half-written.*Load all of its weights again"):
            use()
    assert not changed(before, model)
    assert not (folder / "copy").exists()


@pytest.mark.parametrize("name", ROADS)
def test_interrupted_at_any_call(name: str, raw: Any, hf: Any, tmp_path: Path) -> None:
    action = actions(raw, hf, tmp_path)[name]
    done = copy.deepcopy(raw)
    total = calls_of(lambda: action(done))
    before, after, hooks = values(raw), values(done), list(raw.hook_dict)
    half = None
    # Spread over the step, and its very end, where records are made and the mark goes.
    for point in [total * i // 10 for i in range(3, 10)] + [total - i for i in range(0, 12, 2)]:
        model = copy.deepcopy(raw)
        calls_of(lambda model=model: action(model), point)  # type: ignore[misc]
        is_as_before = not changed(before, model)
        if is_half_written(model):
            half = model if changed(after, model) and not is_as_before else half
        elif is_as_before:
            assert model.cfg.normalization_type == raw.cfg.normalization_type
            assert list(model.hook_dict) == hooks
            assert all(hook is model.mod_dict[key] for key, hook in model.hook_dict.items())
        else:
            assert not changed(after, model), point
    assert half is not None
    check_refusals(half, tmp_path)
    load_weights_(half, before)  # which makes it whole
    half.process_weights_()
    raw_too = copy.deepcopy(raw)
    raw_too.process_weights_()
    assert not changed(values(raw_too), half)


def stopped(model: Any, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """`process_weights_` with an error after a few writes."""
    from tl_fastload.placement.placer import Placer

    put, count = Placer._put, []

    def fails(self: Any, name: str, tensor: torch.Tensor) -> None:
        count.append(name)
        if len(count) == 5:
            raise error
        put(self, name, tensor)

    with monkeypatch.context() as patched:
        patched.setattr(Placer, "_put", fails)
        model.process_weights_()


def test_errors_in_the_middle_say_so(raw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = values(raw)
    for error, kind in (
        (MemoryError("no memory"), NotEnoughMemory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), NotEnoughMemory),
        (RuntimeError("device lost"), HalfWrittenError),
    ):
        model = copy.deepcopy(raw)
        with pytest.raises(kind, match="stopped in the middle") as caught:
            stopped(model, error, monkeypatch)
        assert caught.value.__cause__ is error
        assert is_half_written(copy.deepcopy(model))
    # Whole again by what brings every weight from elsewhere, and by nothing less.
    wanted = copy.deepcopy(raw)
    wanted.process_weights_()
    model.load_and_process_state_dict({name: v.contiguous() for name, v in before.items()})
    assert not changed(values(wanted), model)
    with pytest.raises(KeyboardInterrupt):
        stopped(half := copy.deepcopy(raw), KeyboardInterrupt(), monkeypatch)
    half.load_state_dict({"embed.W_E": before["embed.W_E"]}, strict=False)
    with pytest.raises(HalfWrittenError):
        half.process_weights_()
    half.load_state_dict(before)
    half.process_weights_()
    assert not changed(values(wanted), half)


def test_no_memory_is_no_missing_weight(raw: Any, hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = copy.deepcopy(raw), values(raw)

    def fails(*arguments: Any, **keywords: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("tl_fastload.hooked.convert.convert", fails)
    with pytest.raises(NotEnoughMemory, match="Nothing was loaded"):
        load_weights_(model, hf)
    assert not changed(before, model)
    assert not is_half_written(model)
