"""Weights for `load_weights_` in tests, and the sources that they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.zoo import write_weights

RAW = {
    "fold_ln": False,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
}
SOURCES = ["state dict", "safetensors file", "torch file", "shards", "index", "torch folder"]


def other_values(model: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict of the same names and shapes, dense, with other weights."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    return {
        name: torch.randn(value.shape, generator=generator).to(value.dtype)
        if name in parameters
        else value.clone()
        for name, value in model.state_dict().items()
    }


def assert_holds(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = model.state_dict()
    wrong = [n for n in state if not torch.equal(own[n], state[n].to(own[n].dtype))]
    assert not wrong


def written(how: str, state: dict[str, torch.Tensor], folder: Path) -> Any:
    """A state dict as one of the sources that `load_weights_` takes."""
    if how == "state dict":
        return state
    if how == "safetensors file":
        save_file(state, folder / "tuned.safetensors")
        return folder / "tuned.safetensors"
    if how == "torch file":
        torch.save({"state_dict": state, "epoch": 3}, folder / "tuned.pt")
        return str(folder / "tuned.pt")
    shards = 3 if how in ("shards", "index") else 1
    write_weights(folder, state, shards=shards, bin=how == "torch folder")
    return folder / "model.safetensors.index.json" if how == "index" else folder
