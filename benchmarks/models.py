"""The benchmark checkpoints: random weights in real shapes, made once into a cache folder."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from tl_fastload.cli.bench import synthetic
from tl_fastload.cli.bench.synthetic import GPT2_NAME, ITEM_BYTES, LLAMA_NAME

CACHE_VARIABLE = "TL_FASTLOAD_BENCH_CACHE"
RECIPE = 1  # raise it when the contents of the files change


@dataclass(frozen=True)
class Shape(synthetic.Shape):
    """One benchmark model. `bounded`: whether the project's bounds apply (they are about models
    that are big enough to matter).
    """

    bounded: bool = True

    @property
    def tied_key(self) -> str | None:
        """The checkpoint entry that serves as embedding and as unembedding, if there is one."""
        return "transformer.wte.weight" if self.family == "gpt2" else None

    def file_numbers(self) -> int:
        """How many numbers the checkpoint holds."""
        return sum(math.prod(dims) for dims in synthetic.entry_shapes(self).values())

    def file_bytes(self) -> int:
        """Size of the weights in the checkpoint."""
        return self.file_numbers() * ITEM_BYTES[self.file_dtype]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("gpt2-medium", "gpt2", GPT2_NAME, "float32", 24, 1024, 16, 16, 4096, 50257, 1024),
        Shape("llama-1.1b", "llama", LLAMA_NAME, "bfloat16", 22, 2048, 32, 4, 5632, 32000, 2048),
        Shape(
            "llama-0.1b", "llama", LLAMA_NAME, "float32", 2, 2048, 32, 4, 5632, 8192, 2048, False
        ),
        Shape("tiny-gpt2", "gpt2", GPT2_NAME, "float32", 2, 64, 4, 4, 256, 257, 64, False),
        Shape("tiny-llama", "llama", LLAMA_NAME, "bfloat16", 2, 64, 4, 2, 192, 320, 64, False),
    )
}


def default_cache() -> Path:
    """`$TL_FASTLOAD_BENCH_CACHE`, or a folder in the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "tl_fastload_bench"


def hub_home(folder: Path) -> Path:
    """What `HF_HOME` must be for the official name to lead to this checkpoint, offline."""
    return folder.parent / f"{folder.name}-hub"


def make_checkpoint(name: str, cache: Path | None = None) -> Path:
    """The folder of a benchmark checkpoint, made when it is not there yet.

    Args:
        name: a key of `SHAPES`.
        cache: where checkpoints are kept; default `default_cache()`.

    Returns:
        A folder with `config.json` and `model.safetensors`, and no tokenizer.
    """
    shape = SHAPES[name]
    folder = (cache or default_cache()) / name
    recipe = {"recipe": RECIPE, "config": synthetic.hf_config(shape)}
    stamp = folder / "recipe.json"
    if not stamp.exists() or json.loads(stamp.read_text()) != recipe:
        stamp.unlink(missing_ok=True)
        synthetic.write_checkpoint(shape, folder)
        synthetic.write_hub_layout(folder, shape.official_name, hub_home(folder))
        stamp.write_text(json.dumps(recipe))  # last: an interrupted run starts again
    return folder
