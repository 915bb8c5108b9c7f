"""GGUF files of tiny models, written by the gguf package, and the numbers that they stand for.

Names are those of gguf's own tensor maps, what is done to weights is what llama.cpp's
`convert_hf_to_gguf.py` does, and values are gguf's `dequantize` of the bytes that were written.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Ggml
from gguf import quants
from transformers import AutoConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.support.zoo_hf import randomize

TYPES = (
    "Q8_0",
    "Q4_K",
    "Q6_K",
    "Q4_0",
    "Q5_1",
    "Q3_K",
    "Q5_0",
    "Q2_K",
    "Q4_1",
    "Q5_K",
    "BF16",
    "F16",
)
"""One after the other for the matrices of a file."""
# Of types that gguf cannot quantize to: where their blocks have a scale, and one for minima.
_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
_MINIMA = {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Case:
    """A tiny model.

    Attributes:
        model: transformers' class.
        config: fields of its configuration.
        arch: llama.cpp's architecture.
        beside: more of the metadata, by the ends of their keys.
    """

    model: str
    config: Mapping[str, Any]
    arch: str
    beside: Mapping[str, Any] = field(default_factory=dict)


_SMALL = {
    "vocab_size": 101,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_GEMMA = {**_SMALL, "head_dim": 64, "tie_word_embeddings": True}
_WINDOW = {"attention.sliding_window": 4}
_EXPERTS = {"expert_count": 3, "expert_used_count": 2}
_LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
}
_YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
}
_LONG = {
    "type": "longrope",
    "short_factor": [1.0 + n / 64 for n in range(32)],
    "long_factor": [2.0 + n / 8 for n in range(32)],
}
CASES: dict[str, Case] = {
    "llama": Case("LlamaForCausalLM", {**_SMALL, "rope_theta": 5000.0}, "llama"),
    "llama3-tied": Case(
        "LlamaForCausalLM",
        {**_SMALL, "tie_word_embeddings": True, "rope_theta": 5e5, "rope_scaling": _LLAMA_3},
        "llama",
    ),
    "mistral": Case(
        "MistralForCausalLM", {**_SMALL, "head_dim": 32, "sliding_window": None}, "llama"
    ),
    "mixtral": Case(
        "MixtralForCausalLM",
        {**_SMALL, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None},
        "llama",
        _EXPERTS,
    ),
    "qwen2": Case("Qwen2ForCausalLM", {**_SMALL, "rope_theta": 1e6}, "qwen2"),
    "qwen3": Case("Qwen3ForCausalLM", {**_SMALL, "head_dim": 128, "rope_theta": 1e6}, "qwen3"),
    "phi3": Case("Phi3ForCausalLM", {**_SMALL, "sliding_window": 4}, "phi3", _WINDOW),
    "phi3-long": Case(
        "Phi3ForCausalLM",
        {**_SMALL, "original_max_position_embeddings": 16, "rope_scaling": _LONG},
        "phi3",
        {"rope.scaling.original_context_length": 16},
    ),
    "gemma": Case("GemmaForCausalLM", {**_GEMMA, "num_key_value_heads": 1}, "gemma"),
    "gemma2": Case(
        "Gemma2ForCausalLM",
        {
            **_GEMMA,
            "sliding_window": 4,
            "query_pre_attn_scalar": 64,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
        "gemma2",
        {**_WINDOW, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    ),
    "gemma3": Case(
        "Gemma3ForCausalLM",
        {
            **_GEMMA,
            "num_hidden_layers": 6,
            "sliding_window": 4,
            "query_pre_attn_scalar": 64,
            "rope_theta": 1e6,
        },
        "gemma3",
        _WINDOW,
    ),
    "gpt-oss": Case(
        "GptOssForCausalLM",
        {
            **_SMALL,
            "head_dim": 64,
            "sliding_window": 4,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "rope_theta": 150000.0,
            "rope_scaling": _YARN,
        },
        "gpt-oss",
        {**_WINDOW, **_EXPERTS, **_YARN_KEYS, "expert_feed_forward_length": 512},
    ),
}


ROTATED = ("llama", "llama3-tied", "mistral", "mixtral")
"""Cases whose queries and keys have their rows in another order than transformers'."""


@dataclass
class Written:
    """A GGUF file.

    Attributes:
        path: the file.
        model: transformers' model with the values that the file stands for.
        values: name in the file -> gguf's values of what was written.
        types: name in the file -> type.
    """

    path: Path
    model: Any
    values: Arrays
    types: dict[str, str]


def build(case_id: str, **changes: Any) -> Any:
    """transformers' model of a case, with random weights."""
    case = CASES[case_id]
    model_class = getattr(transformers, case.model)
    fields = copy.deepcopy({**case.config, **changes})
    config = AutoConfig.for_model(model_class.config_class.model_type, **fields)
    config._attn_implementation = "eager"
    model = model_class(config).float().eval()
    randomize(model, case.model, torch.Generator().manual_seed(0))
    return model


def pack(matrix: np.ndarray[Any, Any], ggml_type: str) -> np.ndarray[Any, Any]:
    """Bytes of rows of a type: of the matrix where gguf can quantize to it, else of numbers of the
    same size.
    """
    if ggml_type not in _SCALES:
        return quants.quantize(np.ascontiguousarray(matrix, np.float32), Ggml[ggml_type])
    size, nbytes = gguf.GGML_QUANT_SIZES[Ggml[ggml_type]]
    generator = np.random.default_rng(matrix.shape[-1])
    shape = (*matrix.shape[:-1], matrix.shape[-1] // size)
    blocks = generator.integers(0, 256, (*shape, nbytes), dtype=np.uint8)

    def with_scales(unit: float) -> np.ndarray[Any, Any]:
        scale = unit * generator.uniform(0.5, 1.5, (*shape, 1))
        for number, at in enumerate(_SCALES[ggml_type]):
            value = scale if number == 0 else scale * _MINIMA[ggml_type]
            blocks[..., at : at + 2] = value.astype(np.float16).view(np.uint8)
        return blocks.reshape(*matrix.shape[:-1], -1)

    spread = quants.dequantize(with_scales(1.0), Ggml[ggml_type]).std()
    return with_scales(float(matrix.std() / spread)).copy()


def write(
    case_id: str,
    path: Path,
    type_of: Callable[[int, str], str] | None = None,
    tokens: Callable[[gguf.GGUFWriter], None] | None = None,
    **changes: Any,
) -> Written:
    """Write the file of a case.

    Args:
        case_id: of `CASES`.
        path: the file.
        type_of: of a matrix, from its number among them and its name; by default `TYPES` in turn.
        tokens: adds a tokenizer; by default only the vocabulary's size is told.
        **changes: fields of the configuration.
    """
    return write_model(build(case_id, **changes), CASES[case_id], path, type_of, tokens)


def case_of(model: Any) -> Case:
    """A case that a model of a plain architecture is of."""
    name = type(model).__name__
    return next(case for case in CASES.values() if case.model == name)


def write_model(
    model: Any,
    case: Case,
    path: Path,
    type_of: Callable[[int, str], str] | None = None,
    tokens: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Written:
    """`write` for transformers' model, in float32, which takes the values of the file."""
    writer = gguf.GGUFWriter(path, case.arch)
    _write_metadata(writer, model.config, case)
    if tokens is not None:
        tokens(writer)
    values: Arrays = {}
    types: dict[str, str] = {}
    back: dict[str, tuple[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]]] = {}
    number = 0
    for name, array, source, undo in _converted(model, case):
        is_matrix = array.ndim > 1 and "ffn_gate_inp" not in name and name.endswith("weight")
        ggml_type = "F32"
        if is_matrix:
            ggml_type = type_of(number, name) if type_of else TYPES[number % len(TYPES)]
            number += 1
        if is_matrix:
            data = pack(array, ggml_type)
            writer.add_tensor(name, data, raw_dtype=Ggml[ggml_type])
            values[name] = quants.dequantize(data, Ggml[ggml_type]).astype(np.float32)
        else:
            writer.add_tensor(name, array.astype(np.float32))
            values[name] = array.astype(np.float32)
        types[name] = ggml_type
        back[name] = (source, undo)
    for name, table in _tables(model.config, case):
        writer.add_tensor(name, table)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    state = model.state_dict()
    with torch.no_grad():
        for name, (source, undo) in back.items():
            part, _, index = source.partition("@")
            target = state[part]
            value = torch.from_numpy(undo(values[name]).copy())
            if index:
                _PARTS[index](target).copy_(value)
            else:
                target.copy_(value)
    return Written(path, model, values, types)


_PARTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "first": lambda t: t[:, : t.shape[1] // 2],
    "second": lambda t: t[:, t.shape[1] // 2 :],
    "even": lambda t: t[..., ::2],
    "odd": lambda t: t[..., 1::2],
}


def _write_metadata(writer: gguf.GGUFWriter, config: Any, case: Case) -> None:
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if case.arch != "phi3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if case.arch not in ("gemma", "gemma2", "gemma3"):
        writer.add_rope_dimension_count(head_dim)
    for key, value in case.beside.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{case.arch}.{key}", value)


def _converted(model: Any, case: Case) -> Any:
    """What is written of each weight: its name, its values, the model's name of it, and how values
    become the model's again.
    """
    config = model.config
    arch = {name: one for one, name in gguf.MODEL_ARCH_NAMES.items()}[case.arch]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)

    def same(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return values

    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        experts = re.match(
            r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_bias)?$", name
        )
        if experts is not None:
            yield from _experts(name, tensor, case, *experts.groups())
            continue
        stem, _, end = name.rpartition(".")
        if name.endswith("sinks"):
            stem, end = name, "weight"
        # Mixtral's router has had two names.
        target = names.get_name(re.sub(r"mlp\.gate$", "block_sparse_moe.gate", stem))
        assert target is not None, name
        target = f"{target}.{end}"
        if case.arch == "llama" and re.search(r"[qk]_proj$", stem):
            heads = config.num_attention_heads if "q_proj" in stem else config.num_key_value_heads
            order = _permuted(np.arange(len(array)), heads)
            yield target, array[order], name, lambda v, order=order: v[np.argsort(order)]
        elif case.arch.startswith("gemma") and stem.endswith("norm"):
            yield target, array + 1, name, lambda v: v - 1
        else:
            yield target, array, name, same


def _permuted(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """`LlamaModel.permute` of convert_hf_to_gguf.py."""
    return rows.reshape(heads, 2, len(rows) // heads // 2).swapaxes(1, 2).reshape(rows.shape)


def _experts(
    name: str, tensor: torch.Tensor, case: Case, layer: str, part: str, bias: str | None
) -> Any:
    """Stacked experts, [expert, out, in], each projection for itself."""
    is_oss = case.arch == "gpt-oss"
    end = "bias" if bias else "weight"
    flip = is_oss and not bias

    def turned(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return values.swapaxes(1, 2) if flip else values

    if part == "down":
        yield f"blk.{layer}.ffn_down_exps.{end}", turned(tensor.numpy()), name, turned
        return
    places = ("even", "odd") if is_oss else ("first", "second")
    for kind, place in zip(("gate", "up"), places, strict=True):
        array = turned(_PARTS[place](tensor).numpy())
        yield f"blk.{layer}.ffn_{kind}_exps.{end}", array, f"{name}@{place}", turned


def _tables(config: Any, case: Case) -> Any:
    """Tables of rotary frequencies, by transformers' own computation of them."""
    scaling = case.config.get("rope_scaling", {})
    if scaling.get("rope_type") == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        exponents = torch.arange(0, 64, 2) / 64
        plain = 1.0 / case.config["rope_theta"] ** exponents
        yield "rope_freqs.weight", (plain / frequencies).numpy().astype(np.float32)
    for kind in ("long", "short"):
        if f"{kind}_factor" in scaling:
            table = np.array(scaling[f"{kind}_factor"], dtype=np.float32)
            yield f"rope_factors_{kind}.weight", table


def byte_level(writer: gguf.GGUFWriter) -> None:
    """A byte-level tokenizer of 264 tokens, as Qwen 2's."""
    tokens = ["<|start|>", "<|end|>", *bytes_to_unicode().values()]
    tokens += ["he", "ll", "hell", "hello", "Ġw", "Ġwo"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages }}")


def sentencepiece(writer: gguf.GGUFWriter) -> None:
    """A tokenizer of 271 tokens with bytes to fall back to, as Llama 2's."""
    words = ["▁", "h", "e", "l", "o", "w", "he", "ll", "hell", "hello", "▁hello", "▁w"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(n) for n in range(len(words))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def log_probs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of transformers' model."""
    with torch.no_grad():
        return model(tokens).logits.log_softmax(-1)
