"""Promises in place of parameters: writes, views, and one memory under several names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tl_fastload.errors import RecordingError
from tl_fastload.recipes.evaluate import evaluate
from tl_fastload.recipes.live import LivePromise, live_tensors
from tl_fastload.recipes.promise import Promise

CPU = torch.device("cpu")
VALUES = torch.arange(12.0).reshape(3, 4)


def live(tensor: torch.Tensor = VALUES) -> LivePromise:
    return live_tensors({"weight": tensor})["weight"]


def value(promise: torch.Tensor) -> torch.Tensor:
    assert isinstance(promise, Promise)
    found: torch.Tensor = evaluate(promise.node, CPU).tensor
    return found


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "mul": lambda x: x.mul_(torch.tensor([1.0, 2.0, 3.0, 4.0])),
    "mul by a number": lambda x: x.mul_(3),
    "add": lambda x: x.add_(torch.ones(4), alpha=2),
    "iadd": lambda x: x.__iadd__(1.5),
    "sub": lambda x: x.sub_(x.mean()),
    "div": lambda x: x.div_(7),
    "fill": lambda x: x.fill_(0.5),
    "zero": lambda x: x.zero_(),
    "copy": lambda x: x.copy_(torch.ones(1, 4, dtype=torch.float64)),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_recorded(write: str) -> None:
    promise, wanted = live(), VALUES.clone()
    with torch.no_grad():
        WRITES[write](promise)
        WRITES[write](wanted)
    assert torch.equal(value(promise), wanted)
    assert value(promise).stride() == wanted.stride()
    assert torch.equal(VALUES, torch.arange(12.0).reshape(3, 4))  # the source is never written


def test_a_view_from_before_a_write_is_not_used_afterwards() -> None:
    promise = live()
    row, copy = promise[0], promise.clone()
    with torch.no_grad():
        promise.mul_(2)
    with pytest.raises(RecordingError, match="from before"):
        row + 1
    assert torch.equal(value(copy), VALUES)
    assert torch.equal(value(promise[0]), VALUES[0] * 2)


def test_a_part_is_not_written_to() -> None:
    with pytest.raises(RecordingError, match="part"), torch.no_grad():
        live()[0].fill_(1)


def test_copying_a_parameter_onto_itself_changes_nothing() -> None:
    promise = live()
    view = promise.detach()
    with torch.no_grad():
        promise.copy_(view.to(torch.float32))
    assert promise.home.version == 0
    view.require_fresh()


def test_a_tensor_with_values_takes_values() -> None:
    bias = torch.ones(4)
    bias.add_(live()[1])
    assert torch.equal(bias, VALUES[1] + 1)


def test_views_share_a_home_and_copies_do_not() -> None:
    promise = live()
    part, parameter = promise[:, 1:3].T, nn.Parameter(promise)
    assert isinstance(parameter, nn.Parameter)
    assert isinstance(part, LivePromise)
    assert part.home is promise.home is parameter.home  # type: ignore[attr-defined]
    assert promise.clone().home is not promise.home  # type: ignore[attr-defined]
    assert promise.to(torch.float64).home is not promise.home  # type: ignore[attr-defined]
    assert promise.data_ptr() == promise.detach().data_ptr() == part.data_ptr() - 4
    assert promise.data_ptr() != promise.clone().data_ptr()
    assert promise.fills_home
    assert not part.fills_home


def test_tensors_of_one_memory_share_a_home() -> None:
    whole = torch.arange(6.0)
    made = live_tensors({"whole": whole, "part": whole[2:], "other": torch.arange(6.0)})
    assert made["part"].home is made["whole"].home
    assert made["other"].home is not made["whole"].home
    assert torch.equal(value(made["part"]), whole[2:])


def test_data_can_be_exchanged() -> None:
    promise = nn.Parameter(live())
    promise.data = promise.data / 2
    assert torch.equal(value(promise), VALUES / 2)
    with pytest.raises(RecordingError, match="shape"):
        promise.data = torch.ones(2)
