"""The zoo's models that transformers has no code for: Qwen 1, SantaCoder and the .pth toys.

Their tensors are written by name, as TransformerLens' converters read them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
TRAINING_TOKENS = (0, 4194304, 2147483648)
"""The labels of the training checkpoints of the .pth models, in tokens."""

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen": (
        "QWenLMHeadModel",
        {
            "architectures": ["QWenLMHeadModel"],
            "auto_map": {
                "AutoConfig": "configuration_qwen.QWenConfig",
                "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
            },
            "model_type": "qwen",
            "vocab_size": 101,
            "hidden_size": 30,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "kv_channels": 10,
            "intermediate_size": 88,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-6,
            "max_position_embeddings": 23,
            "seq_length": 23,
            "scale_attn_weights": True,
            "no_bias": True,
            "rotary_emb_base": 10000,
            "rotary_pct": 1.0,
            "use_dynamic_ntk": True,
            "use_logn_attn": True,
            "tie_word_embeddings": False,
        },
    ),
    "santacoder": (
        "GPT2LMHeadCustomModel",
        {
            "architectures": ["GPT2LMHeadCustomModel"],
            "auto_map": {
                "AutoConfig": "configuration_gpt2_mq.GPT2CustomConfig",
                "AutoModelForCausalLM": "modeling_gpt2_mq.GPT2LMHeadCustomModel",
            },
            "model_type": "gpt2",
            "attention_head_type": "multiquery",
            "activation_function": "gelu_fast",
            "vocab_size": 101,
            "n_positions": 19,
            "n_embd": 30,
            "n_inner": 120,
            "n_layer": 2,
            "n_head": 3,
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
    ),
}

_TOY = {
    "d_model": 30,
    "n_layers": 2,
    "d_mlp": 52,
    "d_head": 6,
    "n_heads": 5,
    "n_ctx": 19,
    "d_vocab": 101,
    "act_fn": "solu_ln",
    "attn_only": False,
    "normalization": "LN",
}
_ATTN_ONLY = {**_TOY, "act_fn": "gelu", "attn_only": True}

# architecture, official name (stock and the loader tell the old ones by it), config.json
PTH_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "attn-only": ("neel", "NeelNanda/Attn_Only_2L512W_C4_Code", _ATTN_ONLY),
    "solu": ("neel", "NeelNanda/SoLU_1L512W_C4_Code", {**_TOY, "n_layers": 1}),
    "gelu": ("neel", "NeelNanda/GELU_2L512W_C4_Code", {**_TOY, "act_fn": "gelu"}),
    "shortformer": (
        "neel",
        "NeelNanda/Attn-Only-2L512W-Shortformer-6B-big-lr",
        {**_ATTN_ONLY, "shortformer_pos": True},
    ),
    "solu-old": ("neel-solu-old", "NeelNanda/SoLU_2L_v10_old", _TOY),
    "solu-old-8l": ("neel-solu-old", "NeelNanda/SoLU_8L_v21_old", {**_TOY, "n_layers": 8}),
    "othello": (
        "mingpt",
        "Baidicoot/Othello-GPT-Transformer-Lens",
        {
            **_TOY,
            "architecture": "mingpt",
            "d_mlp": 120,
            "d_vocab": 61,
            "act_fn": "gelu",
            "normalization_type": "LN",
        },
    ),
}


class _Draw:
    """Random tensors of the kinds that a model has, from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def matrix(self, *shape: int, fan_in: int) -> torch.Tensor:
        return 1.2 / math.sqrt(fan_in) * torch.randn(shape, generator=self.generator)

    def embedding(self, *shape: int) -> torch.Tensor:
        return 0.5 * torch.randn(shape, generator=self.generator)

    def norm(self, length: int) -> torch.Tensor:
        return 1.0 + 0.2 * torch.randn(length, generator=self.generator)

    def bias(self, *shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, generator=self.generator)


def _qwen(config: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    draw, d_model = _Draw(generator), config["hidden_size"]
    d_mlp, d_vocab = config["intermediate_size"] // 2, config["vocab_size"]
    tensors = {"transformer.wte.weight": draw.embedding(d_vocab, d_model)}
    for layer in range(config["num_hidden_layers"]):
        block = f"transformer.h.{layer}"
        tensors[f"{block}.ln_1.weight"] = draw.norm(d_model)
        tensors[f"{block}.attn.c_attn.weight"] = draw.matrix(3 * d_model, d_model, fan_in=d_model)
        tensors[f"{block}.attn.c_attn.bias"] = draw.bias(3 * d_model)
        tensors[f"{block}.attn.c_proj.weight"] = draw.matrix(d_model, d_model, fan_in=d_model)
        tensors[f"{block}.ln_2.weight"] = draw.norm(d_model)
        tensors[f"{block}.mlp.w1.weight"] = draw.matrix(d_mlp, d_model, fan_in=d_model)
        tensors[f"{block}.mlp.w2.weight"] = draw.matrix(d_mlp, d_model, fan_in=d_model)
        tensors[f"{block}.mlp.c_proj.weight"] = draw.matrix(d_model, d_mlp, fan_in=d_mlp)
    tensors["transformer.ln_f.weight"] = draw.norm(d_model)
    tensors["lm_head.weight"] = draw.matrix(d_vocab, d_model, fan_in=d_model)
    return tensors


def _santacoder(config: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    draw, d_model = _Draw(generator), config["n_embd"]
    d_head, d_mlp = d_model // config["n_head"], 4 * d_model
    linear = {
        "attn.q_attn": (d_model, d_model),
        "attn.kv_attn": (d_model, 2 * d_head),
        "attn.c_proj": (d_model, d_model),
        "mlp.c_fc": (d_model, d_mlp),
        "mlp.c_proj": (d_mlp, d_model),
    }
    tensors = {
        "transformer.wte.weight": draw.embedding(config["vocab_size"], d_model),
        "transformer.wpe.weight": draw.embedding(config["n_positions"], d_model),
    }
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}"
        for norm in ("ln_1", "ln_2"):
            tensors[f"{block}.{norm}.weight"] = draw.norm(d_model)
            tensors[f"{block}.{norm}.bias"] = draw.bias(d_model)
        for name, (n_in, n_out) in linear.items():
            tensors[f"{block}.{name}.weight"] = draw.matrix(n_in, n_out, fan_in=n_in)
            tensors[f"{block}.{name}.bias"] = draw.bias(n_out)
    tensors["transformer.ln_f.weight"] = draw.norm(d_model)
    tensors["transformer.ln_f.bias"] = draw.bias(d_model)
    tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], d_model, fan_in=d_model)
    return tensors


TENSORS: dict[str, Callable[[Mapping[str, Any], torch.Generator], Tensors]] = {
    "QWenLMHeadModel": _qwen,
    "GPT2LMHeadCustomModel": _santacoder,
}


def _neel(config: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """A state dict with HookedTransformer's own names and shapes."""
    draw, d_model, d_vocab = _Draw(generator), config["d_model"], config["d_vocab"]
    heads, d_head, d_mlp = config["n_heads"], config["d_head"], config["d_mlp"]
    n_ctx = config["n_ctx"]
    tensors = {
        "embed.W_E": draw.embedding(d_vocab, d_model),
        "pos_embed.W_pos": draw.embedding(n_ctx, d_model),
    }
    for layer in range(config["n_layers"]):
        block = f"blocks.{layer}"
        for norm in ("ln1",) if config["attn_only"] else ("ln1", "ln2"):
            tensors[f"{block}.{norm}.w"] = draw.norm(d_model)
            tensors[f"{block}.{norm}.b"] = draw.bias(d_model)
        for letter in "QKV":
            weight = draw.matrix(heads, d_model, d_head, fan_in=d_model)
            tensors[f"{block}.attn.W_{letter}"] = weight
            tensors[f"{block}.attn.b_{letter}"] = draw.bias(heads, d_head)
        tensors[f"{block}.attn.W_O"] = draw.matrix(heads, d_head, d_model, fan_in=d_model)
        tensors[f"{block}.attn.b_O"] = draw.bias(d_model)
        if config["attn_only"]:
            continue
        tensors[f"{block}.mlp.W_in"] = draw.matrix(d_model, d_mlp, fan_in=d_model)
        tensors[f"{block}.mlp.b_in"] = draw.bias(d_mlp)
        if config["act_fn"].endswith("_ln"):
            tensors[f"{block}.mlp.ln.w"] = draw.norm(d_mlp)
            tensors[f"{block}.mlp.ln.b"] = draw.bias(d_mlp)
        tensors[f"{block}.mlp.W_out"] = draw.matrix(d_mlp, d_model, fan_in=d_mlp)
        tensors[f"{block}.mlp.b_out"] = draw.bias(d_model)
    tensors["ln_final.w"] = draw.norm(d_model)
    tensors["ln_final.b"] = draw.bias(d_model)
    tensors["unembed.W_U"] = draw.matrix(d_model, d_vocab, fan_in=d_model)
    tensors["unembed.b_U"] = draw.bias(d_vocab)
    return tensors


def _neel_solu_old(config: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    """The same with the old names; up to six layers all weights face left, at eight only W_pos."""
    tensors = {}
    for name, value in _neel(config, generator).items():
        left = config["n_layers"] <= (8 if "W_pos" in name else 6)
        if "W_" in name and left:
            value = value.transpose(-2, -1).contiguous()
        old = "norm" + name.removeprefix("ln_final") if name.startswith("ln_final") else name
        old = old.replace(".ln1", ".norm1").replace(".ln2", ".norm2").replace(".ln.", ".norm.")
        tensors[old] = value
    return tensors


def _mingpt(config: Mapping[str, Any], generator: torch.Generator) -> Tensors:
    draw, d_model, d_vocab = _Draw(generator), config["d_model"], config["d_vocab"]
    d_mlp, n_ctx = config["d_mlp"], config["n_ctx"]
    linear = {f"attn.{name}": (d_model, d_model) for name in ("query", "key", "value", "proj")}
    linear |= {"mlp.0": (d_mlp, d_model), "mlp.2": (d_model, d_mlp)}
    tensors = {
        "pos_emb": draw.embedding(1, n_ctx, d_model),
        "tok_emb.weight": draw.embedding(d_vocab, d_model),
    }
    for layer in range(config["n_layers"]):
        block = f"blocks.{layer}"
        for norm in ("ln1", "ln2"):
            tensors[f"{block}.{norm}.weight"] = draw.norm(d_model)
            tensors[f"{block}.{norm}.bias"] = draw.bias(d_model)
        for name, (n_out, n_in) in linear.items():
            tensors[f"{block}.{name}.weight"] = draw.matrix(n_out, n_in, fan_in=n_in)
            tensors[f"{block}.{name}.bias"] = draw.bias(n_out)
        tensors[f"{block}.attn.mask"] = torch.ones(n_ctx, n_ctx).tril().view(1, 1, n_ctx, n_ctx)
    tensors["ln_f.weight"] = draw.norm(d_model)
    tensors["ln_f.bias"] = draw.bias(d_model)
    tensors["head.weight"] = draw.matrix(d_vocab, d_model, fan_in=d_model)
    return tensors


_PTH_TENSORS: dict[str, Callable[[Mapping[str, Any], torch.Generator], Tensors]] = {
    "neel": _neel,
    "neel-solu-old": _neel_solu_old,
    "mingpt": _mingpt,
}


def write_pth(
    architecture: str,
    config: Mapping[str, Any],
    folder: Path,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> None:
    """Write `config.json`, `model_final.pth` and `checkpoints/model_<tokens>.pth`."""
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    (folder / "checkpoints").mkdir(exist_ok=True)
    names = [f"checkpoints/model_{tokens:012d}.pth" for tokens in TRAINING_TOKENS]
    for name in ["model_final.pth", *names]:
        tensors = _PTH_TENSORS[architecture](config, generator)
        torch.save({key: value.to(dtype) for key, value in tensors.items()}, folder / name)
