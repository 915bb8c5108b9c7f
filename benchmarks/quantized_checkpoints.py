"""Checkpoints that transformers quantized with bitsandbytes and saved, made once.

`python -m benchmarks.quantized_checkpoints SOURCE TARGET KIND` makes one, in a process of its own
so that the benchmark itself stays small.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import models

KINDS = ("int8", "nf4")
_RECIPE = 1  # raise it when the contents of the files change
_PROJECT = Path(__file__).resolve().parents[1]


def make_quantized_checkpoint(name: str, kind: str, cache: Path | None = None) -> Path:
    """The folder of a quantized benchmark checkpoint, made when it is not there yet.

    Args:
        name: a key of `benchmarks.models.SHAPES`.
        kind: one of `KINDS`.
        cache: where checkpoints are kept; default `models.default_cache()`.
    """
    source = models.make_checkpoint(name, cache)
    target = source.parent / f"{name}-{kind}"
    made_from = json.loads((source / "recipe.json").read_text())
    recipe = {"quantized": _RECIPE, "kind": kind, "source": made_from}
    stamp = target / "recipe.json"
    if not stamp.exists() or json.loads(stamp.read_text()) != recipe:
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        module = "benchmarks.quantized_checkpoints"
        arguments = [sys.executable, "-m", module, str(source.resolve()), str(partial), kind]
        subprocess.run(arguments, cwd=_PROJECT, check=True)
        (partial / "recipe.json").write_text(json.dumps(recipe))
        partial.replace(target)
    return target


def bnb_config(kind: str, dtype: Any) -> Any:
    """transformers' configuration of one of `KINDS`.

    Args:
        kind: one of `KINDS`.
        dtype: what 4-bit kernels multiply in.
    """
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig  # has no types in some versions
    if kind == "int8":
        return make(load_in_8bit=True)
    return make(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)


def _quantize(source: str, target: str, kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    config = bnb_config(kind, torch.bfloat16)
    model = load(source, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(target)


if __name__ == "__main__":
    _quantize(*sys.argv[1:])
