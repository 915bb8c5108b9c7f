"""Checkpoints that transformers quantized with bitsandbytes and saved, or in formats that are only
read, packed as the tests pack theirs; made once.

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
GGUF = {"gguf-q8_0": "Q8_0", "gguf-q4_k": "Q4_K", "gguf-q6_k": "Q6_K"}
"""Kinds of GGUF files, with every matrix in blocks of one type."""
PACKED = ("fp8", "ct-int8", "ct-w4", "gptq", "gptq-order", "gptq-8", "awq", "torchao-fp8", *GGUF)
"""Formats that are only read, with the block and group sizes that are published."""
_RECIPE = 1  # raise it when the contents of the files change
_PROJECT = Path(__file__).resolve().parents[1]


def make_quantized_checkpoint(name: str, kind: str, cache: Path | None = None) -> Path:
    """The folder of a quantized benchmark checkpoint, made when it is not there yet.

    Args:
        name: a key of `benchmarks.models.SHAPES`.
        kind: one of `KINDS` or of `PACKED`.
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


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that hold its weights."""
    return [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]


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


def _pack(source: Path, target: Path, kind: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from tests.support import quantized_int4 as int4
    from tests.support import quantized_packed as packed

    tested = packed.PACKINGS
    packings = {
        "fp8": packed.Packing(
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            packed.codes(torch.float8_e4m3fn, (128, 128), "weight_scale_inv"),
        ),
        "ct-int8": tested["ct-int"],
        "ct-w4": packed.Packing(int4.compressed_config(4, 128), int4.compressed(4, 128)),
        "gptq": packed.Packing(int4.gptq_config(4, 128), int4.gptq(4, 128)),
        "gptq-order": packed.Packing(
            int4.gptq_config(4, 128, desc_act=True), int4.gptq(4, 128, reordered=True)
        ),
        "gptq-8": packed.Packing(int4.gptq_config(8, 128), int4.gptq(8, 128)),
        "awq": packed.Packing(int4.awq_config(128), int4.awq(128)),
        "torchao-fp8": tested["torchao-fp8"],
    }
    tensors = {
        name: value.float() for name, value in load_file(source / "model.safetensors").items()
    }
    made, _ = packed.pack(tensors, packings[kind], is_gpt2=False)
    target.mkdir()
    contiguous = {name: value.contiguous() for name, value in made.items()}
    save_file(contiguous, target / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((source / "config.json").read_text())
    fields["quantization_config"] = dict(packings[kind].declared)
    (target / "config.json").write_text(json.dumps(fields))


def _write_gguf(source: Path, target: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    from tests.support import gguf_files

    model = AutoModelForCausalLM.from_pretrained(source)
    target.mkdir()
    case, path = gguf_files.case_of(model), target / "model.gguf"
    gguf_files.write_model(model, case, path, lambda *_: GGUF[kind])
    shutil.copy(source / "config.json", target)  # says what to import before the clock starts


def _quantize(source: str, target: str, kind: str) -> None:
    if kind in GGUF:
        _write_gguf(Path(source), Path(target), kind)
        return
    if kind in PACKED:
        _pack(Path(source), Path(target), kind)
        return
    import torch
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    config = bnb_config(kind, torch.bfloat16)
    model = load(source, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(target)


if __name__ == "__main__":
    _quantize(*sys.argv[1:])
