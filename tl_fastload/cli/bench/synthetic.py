"""Checkpoints of random weights in a given shape: what loading costs does not depend on values."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tl_fastload.errors import ArgumentError

if TYPE_CHECKING:
    import torch

_CHUNK_ELEMENTS = 1 << 22
_WEIGHT_STD = 0.02
_NORM_STD = 0.1
_REVISION = "0" * 40

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The size of one number of each dtype."""

# Names of models whose configuration TransformerLens takes from config.json. For the Llama: a name
# with "llama" in it would be given the shape that its tables have for that name.
GPT2_NAME = "gpt2-medium"
LLAMA_NAME = "01-ai/Yi-6B"


@dataclass(frozen=True)
class Shape:
    """A model without values.

    `official_name` is the name under which TransformerLens' own `from_pretrained` loads it: one
    whose configuration it takes from `config.json`.
    """

    name: str
    family: str
    official_name: str
    file_dtype: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_mlp: int
    d_vocab: int
    n_ctx: int


_FAMILIES = {"gpt2": (GPT2_NAME, 50257), "llama": (LLAMA_NAME, 32000)}
_NUMBERS = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_mlp", "d_vocab", "n_ctx")


def checked_model(model: str | None, shape: str | None) -> str | Shape:
    """What a command is about; says what is wrong with it before anything slow is imported.

    Raises:
        typer.BadParameter: neither a model nor a shape is given, or both are.
        ArgumentError: as `parse_shape`.
    """
    if (model is None) == (shape is None):
        raise typer.BadParameter(
            "name a model or give --shape, one of the two.", param_hint="'MODEL' / '--shape'"
        )
    return str(model) if shape is None else parse_shape(shape)


def parse_shape(text: str) -> Shape:
    """Read a shape such as "llama:d_model=512,n_layers=8,dtype=bfloat16".

    Args:
        text: "gpt2" or "llama", then any of n_layers, d_model, n_heads, n_kv_heads, d_mlp, d_vocab,
            n_ctx and dtype (of the file). What is left out follows from the width: heads of 64
            numbers, an MLP four times as wide; 4 layers, 1024 positions, the family's vocabulary.

    Raises:
        ArgumentError: something in it is unknown, no number, or does not divide.
    """
    family, _, rest = text.partition(":")
    if family not in _FAMILIES:
        raise ArgumentError(
            f"--shape {text}: {family!r} is none of {', '.join(_FAMILIES)}. Write for instance "
            "llama:d_model=512,n_layers=8."
        )
    fields = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    official_name, d_vocab = _FAMILIES[family]
    file_dtype = fields.pop("dtype", "float32" if family == "gpt2" else "bfloat16")
    if file_dtype not in ITEM_BYTES:
        raise ArgumentError(f"--shape: dtype={file_dtype} is none of {', '.join(ITEM_BYTES)}.")
    unknown = sorted(set(fields) - set(_NUMBERS))
    if unknown:
        raise ArgumentError(
            f"--shape: {', '.join(unknown)} is none of {', '.join(_NUMBERS)}, dtype."
        )
    sizes = {name: _positive(name, value) for name, value in fields.items()}
    width = sizes.setdefault("d_model", 512)
    heads = sizes.setdefault("n_heads", max(1, width // 64))
    defaults = {"n_layers": 4, "n_kv_heads": heads, "d_mlp": 4 * width, "n_ctx": 1024}
    sizes = {**defaults, "d_vocab": d_vocab, **sizes}
    if width % heads or heads % sizes["n_kv_heads"] or width // heads % 2:
        raise ArgumentError(
            f"--shape: d_model={width} must be an even multiple of n_heads={heads}, and n_heads a "
            f"multiple of n_kv_heads={sizes['n_kv_heads']}."
        )
    if family == "gpt2" and sizes["n_kv_heads"] != heads:
        raise ArgumentError("--shape: GPT-2 has as many key-value heads as heads.")
    return Shape(text, family, official_name, file_dtype, **sizes)


def _positive(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentError(f"--shape: {name}={text} is not a number from 1 on.")
    return int(text)


def entry_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the checkpoint, in file order: those of transformers' own
    model; tied ones once.
    """
    import torch
    import transformers

    values = hf_config(shape)
    config = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = getattr(transformers, values["architectures"][0])(config)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def hf_config(shape: Shape) -> dict[str, Any]:
    """The `config.json` of the checkpoint, with the fields that the real repositories have."""
    if shape.family == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "n_ctx": shape.n_ctx,  # transformers 5 no longer writes it; TransformerLens needs it
            "n_embd": shape.d_model,
            "n_head": shape.n_heads,
            "n_inner": shape.d_mlp,
            "n_layer": shape.n_layers,
            "n_positions": shape.n_ctx,
            "vocab_size": shape.d_vocab,
            "bos_token_id": shape.d_vocab - 1,
            "eos_token_id": shape.d_vocab - 1,
            "torch_dtype": shape.file_dtype,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_mlp,
        "max_position_embeddings": shape.n_ctx,
        "num_attention_heads": shape.n_heads,
        "num_hidden_layers": shape.n_layers,
        "num_key_value_heads": shape.n_kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": shape.d_vocab,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": shape.file_dtype,
    }


def weights_file(folder: Path) -> Path:
    """The one weight file of a folder that `write_checkpoint` wrote."""
    return folder / "model.safetensors"


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, and no tokenizer; always the same values, and no
    tensor is ever whole in memory.
    """
    import torch  # not needed when the file is already there

    from tl_fastload.source.safetensors import header_of

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)  # which may be a link
    (folder / "config.json").write_text(json.dumps(hf_config(shape), indent=2))
    dtype = getattr(torch, shape.file_dtype)
    entries = entry_shapes(shape)
    generator = torch.Generator().manual_seed(0)
    partial = weights_file(folder).with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        file.write(header_of({k: (dtype, dims) for k, dims in entries.items()}))
        for key, dims in entries.items():
            for chunk in _random_chunks(key, math.prod(dims), generator):
                chunk.to(dtype).view(torch.uint8).numpy().tofile(file)
    partial.replace(weights_file(folder))


def _random_chunks(key: str, elements: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    import torch

    is_norm_weight = key.endswith("weight") and ("norm" in key or ".ln_" in key)
    mean, std = (1.0, _NORM_STD) if is_norm_weight else (0.0, _WEIGHT_STD)
    for start in range(0, elements, _CHUNK_ELEMENTS):
        size = min(_CHUNK_ELEMENTS, elements - start)
        yield torch.randn(size, generator=generator).mul_(std).add_(mean)


def write_hub_layout(folder: Path, official_name: str, hub_home: Path) -> None:
    """Make a hub cache in which an official name is the checkpoint in a folder, without a copy.

    Args:
        folder: the checkpoint.
        official_name: a hub name.
        hub_home: what `HF_HOME` must be for the name to lead to the folder, offline.
    """
    root = hub_home / "hub" / f"models--{official_name.replace('/', '--')}"
    snapshot = root / "snapshots" / _REVISION
    snapshot.mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(_REVISION)
    (root / "blobs").mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.is_file():
            # By way of the blobs, as huggingface_hub does it: no other link may leave a snapshot.
            for link, target in (
                (root / "blobs" / file.name, file),
                (snapshot / file.name, root / "blobs" / file.name),
            ):
                link.unlink(missing_ok=True)
                link.symlink_to(os.path.relpath(target, link.parent))
