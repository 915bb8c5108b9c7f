"""What a recipe leaves as it is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.programs import in_memory
from tl_fastload.recipes.nodes import SourceView, as_stored
from tl_fastload.recipes.promise import node_of

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("stored", "step", "stays"),
    [
        (BRAIN, lambda x: x.float().T.contiguous().to(BRAIN), True),
        (HALF, lambda x: x.double().to(SINGLE).clone().half(), True),
        (SINGLE, lambda x: x[1:].clone(), True),
        (SINGLE, lambda x: x, True),
        (SINGLE, lambda x: x.to(BRAIN).float(), False),  # rounds
        (BRAIN, lambda x: x.half().to(BRAIN), False),  # overflows
        (BRAIN, lambda x: x.float(), False),  # is another dtype in the end
        (SINGLE, lambda x: (x * 1).clone(), False),
        (torch.int64, lambda x: x.float().long(), False),  # large numbers round
    ],
)
def test_copies_and_casts_that_change_nothing(
    stored: torch.dtype, step: Callable[[Any], Any], stays: bool
) -> None:
    values = torch.tensor([[1.0, -2.5, 3e-5], [0.0, 7.25, 60000.0]]).to(stored)
    recipe = step(in_memory([values])[0])
    found = as_stored(node_of(recipe))
    if not stays:
        assert found is node_of(recipe)
        return
    assert isinstance(found, SourceView)
    assert not found.casts
    view = values.as_strided(
        found.geometry.shape, found.geometry.stride(), int(found.geometry.storage_offset())
    )
    assert torch.equal(view, step(values))
