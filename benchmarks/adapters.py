"""A random LoRA adapter for each benchmark model: rank 16 on every projection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.models import SHAPES
from tl_fastload.cli.bench.synthetic import entry_shapes

RANK = 16
_STD = 0.02
_PROJECTIONS = ("_proj.weight", "c_attn.weight", "c_fc.weight")


def make_adapter(model: str, checkpoint: Path) -> Path:
    """The folder of a benchmark model's adapter, beside its checkpoint, made when it is not there.

    Args:
        model: a key of `benchmarks.models.SHAPES`.
        checkpoint: the folder of its checkpoint.
    """
    folder = checkpoint.parent / f"{checkpoint.name}-lora"
    config = folder / "adapter_config.json"
    if not config.exists():
        folder.mkdir(exist_ok=True)
        _write_weights(model, folder / "adapter_model.safetensors")
        config.write_text(json.dumps(_config(model)))  # last: an interrupted run starts again
    return folder


def _modules(model: str) -> dict[str, tuple[int, int]]:
    """Names of the projections, with (in, out)."""
    is_gpt2 = SHAPES[model].family == "gpt2"  # whose matrices are stored [in, out]
    return {
        name.removesuffix(".weight"): (dims[0], dims[1]) if is_gpt2 else (dims[1], dims[0])
        for name, dims in entry_shapes(SHAPES[model]).items()
        if name.endswith(_PROJECTIONS)
    }


def _config(model: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({name.rpartition(".")[2] for name in _modules(model)}),
        "fan_in_fan_out": SHAPES[model].family == "gpt2",
    }


def _write_weights(model: str, path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (inputs, outputs) in _modules(model).items():
        for factor, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
            values = torch.randn(shape, generator=generator) * _STD
            tensors[f"base_model.model.{name}.lora_{factor}.weight"] = values
    save_file(tensors, path)
