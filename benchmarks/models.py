"""The benchmark checkpoints: random weights in real shapes, made once into a cache folder."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CACHE_VARIABLE = "TL_FASTLOAD_BENCH_CACHE"
RECIPE = 1  # raise it when the contents of the files change
_CHUNK_ELEMENTS = 1 << 22
_WEIGHT_STD = 0.02
_NORM_STD = 0.1
_FORMAT_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Shape:
    """One benchmark model.

    `official_name` is the name under which TransformerLens' own `from_pretrained` loads these
    weights: one whose configuration it takes from `config.json`. `bounded`: whether the
    project's bounds apply (they are about models that are big enough to matter).
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
    bounded: bool = True

    @property
    def tied_key(self) -> str | None:
        """The checkpoint entry that serves as embedding and as unembedding, if there is one."""
        return "transformer.wte.weight" if self.family == "gpt2" else None


_GPT2_NAME = "gpt2-medium"
# A Llama that TransformerLens reads from config.json: a name with "llama" in it would be given
# the shape that its tables have for that name.
_LLAMA_NAME = "01-ai/Yi-6B"

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("gpt2-medium", "gpt2", _GPT2_NAME, "float32", 24, 1024, 16, 16, 4096, 50257, 1024),
        Shape("llama-1.1b", "llama", _LLAMA_NAME, "bfloat16", 22, 2048, 32, 4, 5632, 32000, 2048),
        Shape("tiny-gpt2", "gpt2", _GPT2_NAME, "float32", 2, 64, 4, 4, 256, 257, 64, False),
        Shape("tiny-llama", "llama", _LLAMA_NAME, "bfloat16", 2, 64, 4, 2, 192, 320, 64, False),
    )
}


def default_cache() -> Path:
    """`$TL_FASTLOAD_BENCH_CACHE`, or a folder in the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "tl_fastload_bench"


def entry_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the checkpoint, in file order."""
    return dict(_gpt2_entries(shape) if shape.family == "gpt2" else _llama_entries(shape))


def _gpt2_entries(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = shape.d_model, shape.d_mlp
    yield "transformer.wte.weight", (shape.d_vocab, width)
    yield "transformer.wpe.weight", (shape.n_ctx, width)
    for layer in range(shape.n_layers):
        block = f"transformer.h.{layer}."
        for norm in ("ln_1", "ln_2"):
            yield f"{block}{norm}.weight", (width,)
            yield f"{block}{norm}.bias", (width,)
        for name, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, inner),
            ("mlp.c_proj", inner, width),
        ):
            yield f"{block}{name}.weight", (rows, columns)
            yield f"{block}{name}.bias", (columns,)
    yield "transformer.ln_f.weight", (width,)
    yield "transformer.ln_f.bias", (width,)


def _llama_entries(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = shape.d_model, shape.d_mlp
    kv_width = width // shape.n_heads * shape.n_kv_heads
    yield "model.embed_tokens.weight", (shape.d_vocab, width)
    for layer in range(shape.n_layers):
        block = f"model.layers.{layer}."
        yield f"{block}input_layernorm.weight", (width,)
        yield f"{block}post_attention_layernorm.weight", (width,)
        for name, rows, columns in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", kv_width, width),
            ("self_attn.v_proj", kv_width, width),
            ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", inner, width),
            ("mlp.up_proj", inner, width),
            ("mlp.down_proj", width, inner),
        ):
            yield f"{block}{name}.weight", (rows, columns)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (shape.d_vocab, width)


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


def item_bytes(dtype: str) -> int:
    """Size of one number."""
    return {"float32": 4, "bfloat16": 2}[dtype]


def file_bytes(shape: Shape) -> int:
    """Size of the weights in the checkpoint."""
    elements = sum(math.prod(dims) for dims in entry_shapes(shape).values())
    return elements * item_bytes(shape.file_dtype)


def weights_file(folder: Path) -> Path:
    """The one checkpoint file of a folder that `make_checkpoint` returned."""
    return folder / "model.safetensors"


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
    recipe = {"recipe": RECIPE, "config": hf_config(shape)}
    stamp = folder / "recipe.json"
    if not stamp.exists() or json.loads(stamp.read_text()) != recipe:
        folder.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        (folder / "config.json").write_text(json.dumps(recipe["config"], indent=2))
        _write_weights(shape, weights_file(folder))
        _write_hub_layout(shape, folder)
        stamp.write_text(json.dumps(recipe))  # last: an interrupted run starts again
    return folder


def _write_weights(shape: Shape, path: Path) -> None:
    """Write the safetensors file entry by entry; no tensor is ever whole in memory."""
    import torch  # not needed when the file is already there

    dtype = getattr(torch, shape.file_dtype)
    entries = entry_shapes(shape)
    generator = torch.Generator().manual_seed(0)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(_header(entries, shape.file_dtype))
        for key, dims in entries.items():
            for chunk in _random_chunks(key, math.prod(dims), generator):
                chunk.to(dtype).view(torch.uint8).numpy().tofile(file)
    partial.replace(path)


def _header(entries: dict[str, tuple[int, ...]], dtype: str) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, dims in entries.items():
        end = offset + math.prod(dims) * item_bytes(dtype)
        table[key] = {
            "dtype": _FORMAT_DTYPES[dtype],
            "shape": list(dims),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _random_chunks(key: str, elements: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    import torch

    is_norm_weight = key.endswith("weight") and ("norm" in key or ".ln_" in key)
    mean, std = (1.0, _NORM_STD) if is_norm_weight else (0.0, _WEIGHT_STD)
    for start in range(0, elements, _CHUNK_ELEMENTS):
        size = min(_CHUNK_ELEMENTS, elements - start)
        yield torch.randn(size, generator=generator).mul_(std).add_(mean)


def _write_hub_layout(shape: Shape, folder: Path) -> None:
    """A hub cache in which the official name is this checkpoint, without a copy of it."""
    revision = "0" * 40
    repository = f"models--{shape.official_name.replace('/', '--')}"
    root = hub_home(folder) / "hub" / repository
    snapshot = root / "snapshots" / revision
    snapshot.mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(revision)
    for name in ("config.json", "model.safetensors"):
        link = snapshot / name
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(folder / name, snapshot))
