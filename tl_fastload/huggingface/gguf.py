"""A GGUF file in Hugging Face's terms: its configuration, its tensors under transformers' names.

The metadata's keys and tensors' names are those of gguf-py (`gguf/constants.py`), what llama.cpp
changes in the weights and assumes without writing it is in its `convert_hf_to_gguf.py` and
`src/llama-model.cpp`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tl_fastload.errors import CheckpointError, UnsupportedArchitectureError
from tl_fastload.huggingface.config import Supported
from tl_fastload.quantized.assemble import combine
from tl_fastload.quantized.spec import Spec
from tl_fastload.recipes.promise import Promise
from tl_fastload.source import schemas
from tl_fastload.source.ggml_types import BLOCK_TYPES
from tl_fastload.source.gguf import GgufHeader, Omitted, read_gguf, shard_names
from tl_fastload.source.json_files import short
from tl_fastload.source.location import Location, fetch
from tl_fastload.source.reader import FileReader, FileSource

_AGAIN = "Download the file again, or convert the model anew with llama.cpp."
_CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "gpt-oss": ("gpt_oss", "GptOssForCausalLM"),
}
"""`general.architecture` -> transformers' model type and class; Mixtral's is "llama", too."""
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_sinks": "self_attn.sinks",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_NAMES = {
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "gemma2": {"ffn_norm": "pre_feedforward_layernorm"},
    "gemma3": {"ffn_norm": "pre_feedforward_layernorm"},
    "gpt-oss": {"ffn_gate_inp": "mlp.router"},
    "llama": {"ffn_gate_inp": "block_sparse_moe.gate"},
}
_EXPERTS = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
# Tables of rotary frequencies: the configuration says what is in them.
_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+?)(_exps|\.\d+)?(?:\.(weight|bias))?$")
# Llama 3's scaling of rotary frequencies, of which a file has the result only: `rope_scaling` of
# Llama 3.1 to 3.3, whose `factor` is 8 or 32.
_LLAMA_3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class _Fields:
    """The metadata of one file, asked for by the keys of its architecture.

    Args:
        header: of the first file.
        label: for messages.
        values: gives the values of a small tensor.
    """

    def __init__(
        self, header: GgufHeader, label: str, values: Callable[[str], list[float]]
    ) -> None:
        self.header, self.label, self.values = header, label, values
        self.architecture = str(header.metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        return self.header.metadata.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(
                f"{self.label} has no {self.architecture}.{key} in its metadata. {_AGAIN}"
            )
        return value

    def token(self, name: str) -> int | None:
        return self.header.metadata.get(f"tokenizer.ggml.{name}_token_id")

    def has(self, tensor: str) -> bool:
        """Whether the file has a tensor, of whatever type."""
        names = (tensor, *(f"{tensor}.{ggml_type}" for ggml_type in BLOCK_TYPES))
        return any(name in self.header.entries for name in names)


def read_gguf_config(
    location: Location, supported: Supported, reader: FileReader, headers_only: bool
) -> tuple[GgufHeader, dict[str, Any]]:
    """The header of the first file of a model, and the fields of a `config.json` that it stands
    for; nothing is downloaded if `headers_only`.

    Raises:
        CheckpointError, QuantizationError, UnsupportedArchitectureError: as `read_gguf` and
            `_config`, or the file is not on this machine.
    """
    name = str(location.gguf_file)
    if headers_only and not (location.folder / name).exists():
        raise CheckpointError(
            f"{location.label} is not on this machine, and a plan reads its header. Load it, or "
            "download it with huggingface_hub.hf_hub_download, and plan again."
        )
    path = fetch(location, shard_names(name, read_gguf(fetch(location, name)))[0])
    reader.files.see(path)
    header = read_gguf(path)
    return header, _config(header, location.label, supported, reader)


def _config(
    header: GgufHeader, label: str, supported: Supported, reader: FileReader
) -> dict[str, Any]:
    """The fields of the `config.json` that a GGUF file's metadata stand for.

    Args:
        header: of the first of its files.
        label: for messages.
        supported: which model classes can be loaded.
        reader: reads tables of rotary frequencies, which are a part of the configuration.

    Raises:
        UnsupportedArchitectureError: of its architecture nothing is known here.
        CheckpointError: the metadata lack something, or contradict themselves.
    """

    def values(name: str) -> list[float]:
        entry = header.entries[name]
        if len(entry.shape) != 1 or entry.dtype != torch.float32 or entry.nbytes > 1 << 16:
            raise CheckpointError(f"{label}: {name} is no short row of F32 numbers. {_AGAIN}")
        read: list[float] = FileSource(entry, reader).whole().tolist()
        return read

    fields = _Fields(header, label, values)
    if fields.architecture not in _CLASSES:
        raise UnsupportedArchitectureError(
            f"{label} holds a model of llama.cpp's architecture {short(fields.architecture)}. "
            f"Of GGUF files {', '.join(_CLASSES)} are read; take the model's safetensors version. "
            f"{supported}"
        )
    embedding = _rows(header, "token_embd.weight", label)
    found = {**_common(fields), "vocab_size": embedding, **_particular(fields)}
    if any(name.rpartition(".")[2] in BLOCK_TYPES for name in header.entries):
        found["quantization_config"] = {"quant_method": "gguf"}
    schemas.check(found, schemas.MODEL, f"{label}, as config.json has it", _AGAIN)
    return found


def _rows(header: GgufHeader, tensor: str, label: str) -> int:
    for name, entry in header.entries.items():
        if name == tensor or name.startswith(f"{tensor}."):
            return entry.shape[0]
    raise CheckpointError(f"{label} has no tensor {tensor}. {_AGAIN}")


def _common(fields: _Fields) -> dict[str, Any]:
    model_type, model_class = _CLASSES[fields.architecture]
    heads, width = fields.need("attention.head_count"), fields.need("embedding_length")
    for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(fields.get(name), (list, Omitted)):
            raise UnsupportedArchitectureError(
                f"{fields.label} has layers of different kinds ({name} is a list), which no model "
                "here has. Take the model's safetensors version."
            )
    head_dim = fields.get("attention.key_length")
    if head_dim is None and type(heads) is int and type(width) is int and heads > 0:
        head_dim = width // heads
    return {
        "model_type": model_type,
        "architectures": [model_class],
        "num_hidden_layers": fields.need("block_count"),
        "hidden_size": width,
        "intermediate_size": fields.get("expert_feed_forward_length")
        or fields.need("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.need("context_length"),
        "rms_norm_eps": fields.need("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(fields, head_dim),
        # llama.cpp writes the output projection only where it is not the embedding.
        "tie_word_embeddings": not fields.has("output.weight"),
        "bos_token_id": fields.token("bos"),
        "eos_token_id": fields.token("eos"),
        "pad_token_id": fields.token("padding"),
    }


def _particular(fields: _Fields) -> dict[str, Any]:
    """What only some architectures have."""
    kind, heads = fields.architecture, fields.need("attention.head_count")
    if kind == "llama":
        found: dict[str, Any] = {"attention_bias": fields.has("blk.0.attn_q.bias")}
        found["mlp_bias"] = fields.has("blk.0.ffn_up.bias")
        if not fields.get("expert_count"):
            return found
        return {
            **{"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
            "num_local_experts": fields.get("expert_count"),
            "num_experts_per_tok": fields.need("expert_used_count"),
            "sliding_window": None,
        }
    if kind == "phi3":
        partial = fields.need("rope.dimension_count") / (fields.need("embedding_length") / heads)
        original = fields.get("rope.scaling.original_context_length")
        return {
            "partial_rotary_factor": partial,
            "sliding_window": fields.get("attention.sliding_window") or None,
            "original_max_position_embeddings": original or fields.need("context_length"),
        }
    if kind in ("gemma2", "gemma3"):
        # The layers of the 27B models, whose scale llama.cpp knows by this, too.
        is_27b = fields.need("block_count") == (46 if kind == "gemma2" else 62)
        per_head = fields.need("embedding_length") / heads
        scalar = per_head if is_27b else fields.need("attention.key_length")
        found = {
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
            "sliding_window": fields.need("attention.sliding_window"),
            "attn_logit_softcapping": fields.get("attn_logit_softcapping"),
            "final_logit_softcapping": fields.get("final_logit_softcapping"),
            "hidden_activation": "gelu_pytorch_tanh",
        }
        if kind == "gemma3":
            found["rope_local_base_freq"] = fields.get("rope.freq_base_swa", 10000.0)
            found["sliding_window_pattern"] = 6
        return found
    if kind == "gpt-oss":
        return {
            "num_local_experts": fields.need("expert_count"),
            "num_experts_per_tok": fields.need("expert_used_count"),
            "sliding_window": fields.need("attention.sliding_window"),
            "attention_bias": True,
        }
    return {"hidden_activation": "gelu_pytorch_tanh"} if kind == "gemma" else {}


def _rope_scaling(fields: _Fields, head_dim: Any) -> dict[str, Any] | None:
    """How rotary frequencies are scaled, as `rope_scaling` in a config.json says it."""
    if "rope_factors_long.weight" in fields.header.entries:
        tables = {
            f"{n}_factor": fields.values(f"rope_factors_{n}.weight") for n in ("long", "short")
        }
        return {"type": "longrope", **tables}  # transformers 4 admits no other name beside
    if "rope_freqs.weight" in fields.header.entries:
        return _llama_3_scaling(fields, head_dim)
    kind, factor = fields.get("rope.scaling.type"), fields.get("rope.scaling.factor")
    if kind in (None, "none") or not factor:
        return None
    found = {"type": kind, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = fields.get("rope.scaling.original_context_length")
        found["original_max_position_embeddings"] = original
        if fields.architecture == "gpt-oss":  # which llama.cpp takes from nowhere else, either
            found |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    return found


def _llama_3_scaling(fields: _Fields, head_dim: int) -> dict[str, Any]:
    """The scaling of Llama 3 whose table of factors a file has.

    Raises:
        UnsupportedArchitectureError: it is the table of another scaling.
    """
    table = fields.values("rope_freqs.weight")
    scaling = {**_LLAMA_3, "factor": round(max(table), 4)}
    base = fields.get("rope.freq_base", 10000.0)
    wanted = [_llama_3_factor(base ** (-2 * n / head_dim), scaling) for n in range(head_dim // 2)]
    if len(table) != len(wanted) or any(
        not math.isclose(one, other, rel_tol=1e-4) for one, other in zip(table, wanted, strict=True)
    ):
        raise UnsupportedArchitectureError(
            f"{fields.label} scales rotary frequencies (rope_freqs.weight) in another way than "
            "Llama 3.1 to 3.3 do, which it does not name. Take the model's safetensors version."
        )
    return scaling


def _llama_3_factor(frequency: float, scaling: Mapping[str, Any]) -> float:
    """By how much a rotary frequency is divided (`_compute_llama3_parameters` in transformers)."""
    low, high, factor = (scaling[n] for n in ("low_freq_factor", "high_freq_factor", "factor"))
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    if turns > high:
        return 1.0
    if turns < low:
        return float(factor)
    smooth = (turns - low) / (high - low)
    return float(1 / ((1 - smooth) / factor + smooth))


def _renamed_all(promises: Mapping[str, Promise], architecture: str) -> dict[str, Promise]:
    """A file's tensors under transformers' names, those with experts in one still together; a type
    behind a name stays there. What has no name in transformers keeps its own.

    Args:
        promises: by the file's names.
        architecture: llama.cpp's name.
    """
    names = {**_NAMES, **_OTHER_NAMES.get(architecture, {})}
    found = {}
    for name, promise in promises.items():
        plain, dot, ggml_type = name.rpartition(".")
        if ggml_type not in BLOCK_TYPES:
            plain, dot, ggml_type = name, "", ""
        if plain not in _TABLES:
            found[_renamed(plain, names, architecture) + dot + ggml_type] = promise
    return found


def _renamed(name: str, names: Mapping[str, str], architecture: str) -> str:
    match = _NAME.match(name)
    if match is None:
        return name
    layer, part, experts, end = match.groups()
    front = "" if layer is None else f"model.layers.{layer}."
    if experts is None:
        if part not in names:
            return name
        end = "" if part == "attn_sinks" else f".{end}"
        return f"{front}{names[part]}{end}"
    if part not in _EXPERTS:
        return name
    if architecture == "gpt-oss":
        return f"{front}mlp.experts.{part}.{end}"
    number = "" if experts == "_exps" else experts
    return f"{front}block_sparse_moe.experts{number}.{_EXPERTS[part]}.{end}"


def _as_trained(
    promises: Mapping[str, Promise], config: Any, architecture: str
) -> dict[str, Promise]:
    """Weights as transformers has them: what llama.cpp's conversion changes is changed back.

    Args:
        promises: by the names of `_renamed_all`, pieces put together.
        config: transformers' configuration.
        architecture: llama.cpp's name.
    """
    found: dict[str, Any] = {}
    for name, promise in promises.items():
        changed: Any = promise
        if architecture == "llama" and re.search(r"\.[qk]_proj\.\w+$", name):
            changed = _halves_apart(promise, config, is_key=".k_proj." in name)
        elif architecture in ("gemma", "gemma2", "gemma3") and name.endswith("norm.weight"):
            changed = promise - 1  # in float32, as transformers does it
        stacked = re.match(r"(.*\.experts)\.(w[123])\.(\w+)$", name)
        if stacked is None:
            found[name] = changed
            continue
        for expert in range(promise.shape[0]):
            found[f"{stacked[1]}.{expert}.{stacked[2]}.{stacked[3]}"] = promise[expert]
    return _gpt_oss_experts(found) if architecture == "gpt-oss" else found


def _gpt_oss_experts(weights: dict[str, Any]) -> dict[str, Any]:
    """Experts as transformers has them: [expert, in, out], gate and up in turn."""
    found = dict(weights)
    for name in [name for name in weights if ".experts.ffn_gate." in name]:
        other = name.replace("ffn_gate", "ffn_up")
        if other not in weights or weights[other].shape != weights[name].shape:
            continue  # told with all else that does not fit
        gate, up = found.pop(name), found.pop(other)
        front, _, end = name.partition("ffn_gate.")
        if end == "bias":
            found[f"{front}gate_up_proj_bias"] = torch.stack([gate, up], -1).flatten(1)
            continue
        pairs = [torch.stack([g.t(), u.t()], -1) for g, u in zip(gate, up, strict=True)]
        found[f"{front}gate_up_proj"] = torch.stack([pair.flatten(1) for pair in pairs])
    for name in [name for name in weights if ".experts.ffn_down." in name]:
        down, (front, _, end) = found.pop(name), name.partition("ffn_down.")
        is_bias = end == "bias"
        found[f"{front}down_proj{'_bias' if is_bias else ''}"] = down if is_bias else down.mT
    return found


def _halves_apart(promise: Any, config: Any, *, is_key: bool) -> Any:
    """Rows of a head in the order of transformers' rotation, which turns the first half with the
    second; llama.cpp turns neighbours.
    """
    heads = config.num_key_value_heads if is_key else config.num_attention_heads
    if promise.shape[0] % (2 * heads):
        return promise  # misshapen, which is told with all else that does not fit
    rest = promise.shape[1:]
    pairs = promise.reshape(heads, promise.shape[0] // heads // 2, 2, *rest)
    return pairs.transpose(1, 2).reshape(promise.shape)


def from_gguf(
    promises: Mapping[str, Promise],
    header: GgufHeader,
    config: Any,
    spec: Spec | None,
    dtype: torch.dtype,
    *,
    dense: bool,
) -> dict[str, Promise]:
    """The tensors of GGUF files as a checkpoint of transformers would have them.

    Args:
        promises: by the files' names.
        header: of the first file.
        config: transformers' configuration.
        spec: how the files are quantized; None for plain numbers.
        dtype: what quantized weights compute in.
        dense: make ordinary weights of quantized ones.

    Raises:
        QuantizationError: quantized tensors that are no matrices.
    """
    architecture = str(header.metadata["general.architecture"])
    found = _renamed_all(promises, architecture)
    if spec is not None:
        found = combine(found, spec, dtype, dense=dense)
    return _as_trained(found, config, architecture)
