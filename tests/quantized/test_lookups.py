"""Looking up rows of a quantized matrix, as embeddings do, decodes these rows and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tl_fastload.quantized import formats
from tl_fastload.quantized.content import Content
from tl_fastload.quantized.tensor import from_bytes

KINDS = [kind for format in formats.FORMATS for kind in format.kinds]
INDICES = {
    "some": torch.tensor([[3, 60, 3], [5, 0, 63]]),
    "one": torch.tensor(7),
    "a run": torch.arange(10, 30, dtype=torch.int32),
}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were decoded, call by call."""
    found: list[int] = []
    dense = Content.dense

    def counted(content: Content, dtype: torch.dtype) -> torch.Tensor:
        found.append(content.stored.shape[0])
        return dense(content, dtype)

    monkeypatch.setattr(Content, "dense", counted)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_looked_up(kind: str, decoded: list[int]) -> None:
    matrix = from_bytes(formats.of_kind(kind).sample(kind, torch.device("cpu")))
    scale = torch.linspace(0.5, 2, matrix.shape[1])
    for table in (matrix, matrix.scale_input(scale).center_input()):
        dense = table.dequantize()
        for index in INDICES.values():
            decoded.clear()
            expected = dense[index]
            looked_up: list[Any] = [table[index], table[index, :], F.embedding(index, table)]
            if index.dim() == 1:
                looked_up.append(table.index_select(0, index))
            assert all(torch.equal(found, expected) for found in looked_up)
            assert decoded == [len(index.unique())] * len(looked_up)
        assert torch.equal(table[torch.tensor([-1, -64])], dense[[-1, -64]])


def test_other_indices_see_the_values(decoded: list[int]) -> None:
    matrix = from_bytes(formats.of_kind("fp8").sample("fp8", torch.device("cpu")))
    dense = matrix.dequantize()
    rows, columns = torch.tensor([1, 5]), torch.tensor([7, 100])
    decoded.clear()
    assert torch.equal(matrix[rows, columns], dense[rows, columns])
    assert torch.equal(matrix[:, columns], dense[:, columns])
    assert torch.equal(matrix[dense[:, 0] > 0], dense[dense[:, 0] > 0])
    assert torch.equal(matrix.T[columns], dense.T[columns])
    assert torch.equal(matrix.center_output()[rows], matrix.center_output().dequantize()[rows])
    assert set(decoded) == {64}
    # A view of some rows counts them anew.
    assert torch.equal(matrix[8:40:2][rows], dense[8:40:2][rows])
    for outside in (64, -65):
        with pytest.raises(IndexError, match=f"index {outside} is out of bounds"):
            matrix[torch.tensor([outside])]
    mapped = torch.func.vmap(lambda index: matrix[index])(rows[:, None])
    assert torch.equal(mapped, dense[rows][:, None])


def test_what_is_looked_up_has_gradients() -> None:
    """As activations that begin with a trainable table have; a frozen module's have none."""
    matrix = from_bytes(formats.of_kind("fp8").sample("fp8", torch.device("cpu")))
    module = torch.nn.Embedding(64, 128)
    module.weight = torch.nn.Parameter(matrix, requires_grad=False)
    tokens = torch.tensor([[1, 5]])
    for found in (module(tokens), module.weight[tokens], module.weight[tokens, :]):
        assert found.requires_grad
        found.square().sum().backward()
        assert torch.equal(found.grad, 2 * matrix.dequantize()[tokens])
    assert module.weight.grad is None
    assert not matrix[tokens].requires_grad  # no parameter
    assert type(module.weight[2:9]) is type(matrix)
    with torch.no_grad():
        assert not module(tokens).requires_grad
    module.requires_grad_(False)
    assert not module(tokens).requires_grad
    with pytest.warns(UserWarning, match="Quantized weights have no gradient"):
        module.requires_grad_(True)
    assert module(tokens).requires_grad
