"""Cases of the zoo in sizes that bitsandbytes multiplies rightly, quantized by transformers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.support import quantized_packed as packed
from tests.support import zoo
from tl_fastload.quantized import QuantizedTensor

CONFIGS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "int8-outliers": {"load_in_8bit": True, "llm_int8_threshold": 1.5},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
"""Ways to quantize: name -> arguments of `BitsAndBytesConfig`; 4-bit kinds compute in float32."""

CASES = """
    gpt2 gpt-neo opt gptj neox llama-gqa llama-gqa1-tied mistral mixtral bloom qwen2 qwen3 phi phi3
    phi3-gqa gemma gemma2 gemma3 olmo olmo2 olmo3 olmoe apertus
""".split()
"""Every architecture whose linear layers transformers quantizes."""

EXPERTS = ("mixtral", "olmoe")


def config(kind: str, *, skip: str = "", **changes: Any) -> BitsAndBytesConfig:
    """The configuration of one of `CONFIGS`; `skip` has the modules that stay as they are."""
    options = {"bnb_4bit_compute_dtype": torch.float32, **CONFIGS[kind], **changes}
    return BitsAndBytesConfig(llm_int8_skip_modules=skip.split() or None, **options)


def wide(case_id: str) -> dict[str, Any]:
    """Sizes of a case so that every row is a whole number of blocks of 64 values.

    Of others the 4-bit kernel for CPUs makes wrong values.
    """
    given = zoo.CASES[case_id].config
    heads_name = next(n for n in ("num_attention_heads", "n_head", "num_heads") if n in given)
    heads, groups = given[heads_name], given.get("num_key_value_heads", given[heads_name])
    if groups == heads:
        new, d_head = {heads_name: 4 if case_id == "bloom" else 3}, 64
    else:
        new, d_head = {heads_name: 4, "num_key_value_heads": 1 if groups == 1 else 2}, 32
    sizes = dict.fromkeys(
        ("hidden_size", "n_embd", "word_embed_proj_dim"), new[heads_name] * d_head
    )
    sizes |= {"intermediate_size": 256, "ffn_dim": 256, "head_dim": d_head, "rotary_dim": 16}
    if "num_key_value_heads" in given:
        new = {"num_key_value_heads": new[heads_name], **new}
    if case_id == "mixtral":
        new["head_dim"] = d_head  # the bridge's zoo gives it another
    return {**{name: size for name, size in sizes.items() if name in given}, **new}


def build(get_zoo: Any, case_id: str) -> Path:
    """The folder of a case, unquantized, in `wide` sizes."""
    folder: Path = get_zoo(case_id, **wide(case_id))
    if case_id == "gpt-neo":
        _soften(folder)
    return folder


def _soften(folder: Path) -> None:
    """GPT-Neo does not scale its scores: with random weights they would magnify any rounding."""
    file, mark = folder / "model.safetensors", folder / "softened"
    if mark.exists():
        return
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    for name in tensors:
        if name.endswith("q_proj.weight"):
            tensors[name] /= math.sqrt(64)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    mark.touch()


@functools.cache
def hf_model(folder: Path, kind: str, **changes: Any) -> Any:
    """transformers' quantized model, without bitsandbytes' inexact shortcut for AVX-512 CPUs.

    Made once: tests must not change it.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=config(kind, **changes),
        dtype=torch.float32,
        attn_implementation="eager",
        device_map={"": "cpu"},
    )
    for _, layer in layers(model):
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    return model.eval()


@functools.cache
def hf_log_probs(folder: Path, kind: str, case_id: str, **changes: Any) -> torch.Tensor:
    """Log-probabilities of transformers' model on the case's tokens: of `hf_model`, or with the
    values of a packed checkpoint.
    """
    if kind in packed.PACKINGS:
        dense = packed.folders(folder, kind)[1]
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        with torch.no_grad():
            return model(zoo.tokens(case_id)).logits.float().log_softmax(-1)
    with torch.no_grad():
        return hf_model(folder, kind, **changes)(zoo.tokens(case_id)).logits.float().log_softmax(-1)


def load(folder: Path, kind: str, **arguments: Any) -> Any:
    """A lean model in one of `CONFIGS` (on transformers' model) or of `packed.PACKINGS`."""
    from tests.support.comparison import lean_model  # needs HookedTransformer

    if kind in packed.PACKINGS:
        return lean_model(saved(folder, kind), **arguments)
    return lean_model(folder, hf_model=hf_model(folder, kind), **arguments)


@functools.cache
def saved(folder: Path, kind: str) -> Path:
    """The quantized model as transformers saves it, or as its format is defined."""
    if kind in packed.PACKINGS:
        return packed.folders(folder, kind)[0]
    target = folder.parent / f"{folder.name}-{kind}"
    hf_model(folder, kind).save_pretrained(target)
    return target


def layers(hf: Any) -> Iterator[tuple[str, Any]]:
    """bitsandbytes' layers of a transformers model, by name."""
    kinds = (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)
    return ((name, module) for name, module in hf.named_modules() if isinstance(module, kinds))


def dequantized(layer: Any) -> torch.Tensor:
    """The float32 weight [out, in] that a layer of bitsandbytes stands for."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return bnb.functional.int8_vectorwise_dequant(layer.weight.data, scales).float()
    return _by_definition(layer.weight.data.reshape(-1), layer.weight.quant_state)


def _by_definition(packed: torch.Tensor, state: Any) -> torch.Tensor:
    # Not bitsandbytes' own function: on CPUs it misreads rows that are not whole blocks.
    scales = state.absmax
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[: state.shape.numel()]
    scales = scales.repeat_interleave(state.blocksize)[: len(codes)]
    return (state.code[codes.long()] * scales).reshape(state.shape).float()


@functools.cache
def dense_folder(case_id: str, folder: Path, kind: str) -> Path:
    """An ordinary checkpoint that holds the dequantized weights."""
    if kind in packed.PACKINGS:
        return packed.folders(folder, kind)[1]
    target = folder.parent / f"{folder.name}-{kind}-dense"
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, layer in layers(hf_model(folder, kind)):
            weight, value = dense.get_submodule(name).weight, dequantized(layer)
            weight.copy_(value.T if type(dense.get_submodule(name)).__name__ == "Conv1D" else value)
    dense.save_pretrained(target)
    return target


def log_probs(model: Any, case_id: str) -> torch.Tensor:
    """Log-probabilities of a `HookedTransformer`, or of a bridge, on the case's tokens."""
    with torch.no_grad():
        return model(zoo.tokens(case_id)).float().log_softmax(-1)


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())


def relative_gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, in units of the norm of what is expected."""
    difference = (found.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm().clamp_min(1e-30))


def quantized_parameters(model: Any) -> dict[str, QuantizedTensor]:
    """The parameters that stayed bytes, by name."""
    named = model.named_parameters()
    return {name: value for name, value in named if isinstance(value, QuantizedTensor)}


def dense_values(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter as an ordinary tensor."""
    return {
        name: value.dequantize() if isinstance(value, QuantizedTensor) else value.detach()
        for name, value in model.named_parameters()
    }
