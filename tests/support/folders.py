"""Model folders for the tests of names, folders and checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

STATE = {"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"


def folder_with(folder: Path, files: Mapping[str, Any]) -> Path:
    """A folder with config.json and `files`: bytes as they are, dicts of tensors, or JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": {"model_type": "gpt2"}, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif name.endswith(".json"):
            path.write_text(json.dumps(content))
        elif name.endswith(".safetensors"):
            save_file(content, path)
        else:
            torch.save(content, path)
    return folder


def edited_copy(
    source: Path,
    target: Path,
    tensors: Callable[[dict[str, torch.Tensor]], Any] | None = None,
    config: Callable[[dict[str, Any]], Any] | None = None,
) -> Path:
    """A copy of a checkpoint of one file, whose tensors and config.json two functions change."""
    shutil.copytree(source, target)
    if tensors is not None:
        file = target / "model.safetensors"
        values = {name: value.clone() for name, value in load_file(file).items()}
        tensors(values)
        file.unlink()
        values = {name: value.contiguous() for name, value in values.items()}
        save_file(values, file, metadata={"format": "pt"})
    if config is not None:
        fields = json.loads((target / "config.json").read_text())
        config(fields)
        (target / "config.json").write_text(json.dumps(fields))
    return target


def index_of(**homes: str) -> dict[str, Any]:
    return {"metadata": {"total_size": 1}, "weight_map": homes}


SHARDED = {
    "s-1.safetensors": {"a": STATE["a"]},
    "s-2.safetensors": {"b": STATE["b"]},
    INDEX: index_of(a="s-1.safetensors", b="s-2.safetensors"),
}
SHARDED_BIN = {
    "s-1.bin": {"a": STATE["a"]},
    "s-2.bin": {"b": STATE["b"]},
    BIN_INDEX: index_of(a="s-1.bin", b="s-2.bin"),
}
