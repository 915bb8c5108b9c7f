"""Checkpoints in real shapes, written as fast as memory is copied."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu_report.sections import Run
from tl_fastload.cli.bench import synthetic
from tl_fastload.source.safetensors import header_of

_SHAPES = {
    "1b": "llama:d_model=2048,n_layers=22,n_heads=32,n_kv_heads=4,d_mlp=5632,n_ctx=2048",
    "8b": "llama:d_model=4096,n_layers=32,n_heads=32,n_kv_heads=8,d_mlp=14336,n_ctx=2048,"
    "d_vocab=128256",
}
_TINY = {
    "1b": "llama:d_model=64,n_layers=2,n_heads=4,n_kv_heads=2,d_mlp=192,d_vocab=320,n_ctx=64",
    "8b": "llama:d_model=128,n_layers=3,n_heads=4,n_kv_heads=2,d_mlp=448,d_vocab=640,n_ctx=64",
}
_STEP_ELEMENTS = 7919  # each tensor starts in another place of the block


def shape_of(run: Run, size: str) -> synthetic.Shape:
    """The shape of a size, "1b" or "8b"; a tiny one in a dry run."""
    return replace(synthetic.parse_shape((_TINY if run.is_dry else _SHAPES)[size]), name=size)


def checkpoint(run: Run, size: str) -> Path:
    """The folder of a size's checkpoint, bfloat16, which TransformerLens finds by name as well;
    written when it is not there.

    Its values are one block of random numbers over and over: what loading costs does not depend on
    them.
    """
    shape, folder = shape_of(run, size), run.work / size
    if not synthetic.weights_file(folder).exists():
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(synthetic.hf_config(shape)))
        _write_weights(shape, synthetic.weights_file(folder), 14 if run.is_dry else 24)
    # One name for both: the size that was asked for last.
    synthetic.write_hub_layout(folder, shape.official_name, Path(os.environ["HF_HOME"]))
    return folder


def _write_weights(shape: synthetic.Shape, path: Path, block_exponent: int) -> None:
    entries = synthetic.entry_shapes(shape)
    generator = torch.Generator().manual_seed(0)

    def random(dims: tuple[int, ...], std: float, mean: float = 0.0) -> memoryview:
        values = torch.randn(dims, generator=generator).mul_(std).add_(mean)
        return memoryview(values.to(torch.bfloat16).view(torch.uint8).numpy())

    block = random(((1 << block_exponent) + 4099,), 0.02)
    with path.open("xb", buffering=0) as file:
        file.write(header_of({key: (torch.bfloat16, dims) for key, dims in entries.items()}))
        for number, (key, dims) in enumerate(entries.items()):
            if "norm" in key:
                file.write(random(dims, 0.1, 1.0))
                continue
            left, at = math.prod(dims) * 2, number * _STEP_ELEMENTS * 2 % len(block)
            while left:
                written = file.write(block[at : at + left])
                left, at = left - written, (at + written) % len(block)
