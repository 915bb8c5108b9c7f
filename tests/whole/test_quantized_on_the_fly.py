"""`quantize=`: bitsandbytes applied to each processed matrix, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import BitsAndBytesConfig

from tests.support import quantized_zoo as qz
from tests.support import reference
from tests.support import zoo as zoo_module
from tests.support.comparison import lean_model
from tl_fastload.report.memory import unique_bytes

pytestmark = pytest.mark.parity

CASES = [*qz.CASES, "qwen", "gpt-oss"]
LEAVES = ("W_Q", "W_K", "W_V", "_W_K", "_W_V", "W_O", "W_in", "W_gate", "W_out")


def _as_matrix(name: str, dense: torch.Tensor) -> torch.Tensor:
    """A TransformerLens parameter as the matrix [out, in] of its linear map."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "W_O":
        return dense.flatten(0, 1).T
    if dense.dim() == 3:
        return dense.transpose(1, 2).flatten(0, 1)
    return dense if leaf == "weight" else dense.T


def _assert_made_by_bitsandbytes(
    weight: Any, matrix: torch.Tensor, kind: str, double: bool = False
) -> None:
    stored, matrix = weight.content.stored, matrix.detach().contiguous()
    if kind == "int8":
        made = bnb.nn.Int8Params(matrix.clone(), requires_grad=False).to("cpu")
        assert torch.equal(stored.codes, made.data)
        assert torch.equal(stored.scales, made.SCB)
        return
    packed, state = bnb.functional.quantize_4bit(
        matrix, blocksize=64, compress_statistics=double, quant_type=kind
    )
    assert torch.equal(stored.packed.flatten(), packed.flatten())
    assert torch.equal(stored.absmax.flatten(), state.absmax.flatten())
    assert stored.is_nested == double
    if double:
        assert torch.equal(stored.nested_absmax.flatten(), state.state2.absmax.flatten())
        assert torch.equal(stored.nested_offset, state.offset)


def _is_projection(name: str) -> bool:
    parts = name.split(".")
    is_expert = "experts" in parts and parts[-1] == "weight"
    return is_expert or parts[-1] in LEAVES


def _folder(zoo: Any, case_id: str) -> Path:
    if case_id in qz.CASES:
        return qz.build(zoo, case_id)
    folder: Path = zoo(case_id, **SIZES[case_id])
    return folder


SIZES: dict[str, dict[str, Any]] = {
    "qwen": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 256},
    "gpt-oss": {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 128,
    },
}


@pytest.mark.parametrize("case_id", CASES)
def test_bytes_are_those_of_bitsandbytes(case_id: str, zoo: Any) -> None:
    folder = _folder(zoo, case_id)
    # Unprocessed weights are mapped where they are not quantized.
    processing = reference.NO_PROCESSING if case_id in ("mixtral", "gemma2", "gpt2") else {}
    dense = dict(lean_model(folder, **processing).named_parameters())
    for kind in ("8bit", "nf4"):
        model = lean_model(folder, quantize=kind, **processing)
        weights = qz.quantized_parameters(model)
        assert set(weights) == {name for name in dense if _is_projection(name)}
        for name, weight in weights.items():
            matrix = _as_matrix(name, dense[name])
            _assert_made_by_bitsandbytes(weight, matrix, {"8bit": "int8"}.get(kind, kind))
            assert weight.shape == dense[name].shape
        named = model.named_parameters()
        matrices = {n for n, p in named if p.dim() > 1 and "b_" not in n}
        assert matrices - set(weights) == set(model.load_report.not_quantized)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "phi3", "gemma2", "bloom"])
def test_unprocessed_it_is_the_model_that_transformers_quantizes(
    case_id: str, kind: str, zoo: Any
) -> None:
    folder = qz.build(zoo, case_id)
    asked = qz.config(kind) if kind == "fp4" else {"int8": "8bit"}.get(kind, kind)
    model = lean_model(folder, quantize=asked, **reference.NO_PROCESSING)
    theirs = lean_model(folder, hf_model=qz.hf_model(folder, kind), **reference.NO_PROCESSING)
    weights = qz.quantized_parameters(theirs)
    assert qz.quantized_parameters(model).keys() == weights.keys()
    for name, weight in qz.quantized_parameters(model).items():
        assert torch.equal(weight.dequantize(), weights[name].dequantize()), name
    expected = qz.hf_log_probs(folder, kind, case_id)
    assert qz.gap(qz.log_probs(model, case_id), expected) < (2e-3 if kind == "int8" else 1e-4)


@pytest.mark.parametrize("case_id", ["gpt2", "neox", "llama-gqa", "mixtral", "olmoe", "olmo2"])
def test_numbers_are_those_of_the_dequantized_matrices(case_id: str, zoo: Any) -> None:
    folder = qz.build(zoo, case_id)
    model, dense = lean_model(folder, quantize="nf4"), lean_model(folder)
    own = dict(dense.named_parameters())
    with torch.no_grad():
        for name, weight in qz.quantized_parameters(model).items():
            assert 0 < qz.relative_gap(weight.dequantize(), own[name]) < 0.2, name
            own[name].copy_(weight.dequantize())
    assert qz.gap(qz.log_probs(model, case_id), qz.log_probs(dense, case_id)) < 1e-4


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
def test_configurations(case_id: str, zoo: Any) -> None:
    folder = qz.build(zoo, case_id)
    dense = dict(lean_model(folder).named_parameters())
    asked = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    for quantize in (asked, asked.to_dict()):
        weights = qz.quantized_parameters(lean_model(folder, quantize=quantize))
        for name, weight in weights.items():
            matrix = _as_matrix(name, dense[name])
            _assert_made_by_bitsandbytes(weight, matrix, "nf4", double=True)
            assert weight.content.compute_dtype == torch.bfloat16
    rows = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.0)
    weights = qz.quantized_parameters(lean_model(folder, quantize=rows))
    assert {weight.content.stored.threshold for weight in weights.values()} == {3.0}


@pytest.mark.parametrize("skip", ["W_out", "down_proj", "mlp.down_proj"])
def test_skipped_modules(skip: str, zoo: Any) -> None:
    """By TransformerLens' name, or by transformers'."""
    folder = qz.build(zoo, "llama-gqa")
    asked = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[skip])
    model = lean_model(folder, quantize=asked)
    reasons = model.load_report.not_quantized
    skipped = [name for name, reason in reasons.items() if "as the configuration asks" in reason]
    assert sorted(skipped) == [f"blocks.{i}.mlp.W_out" for i in range(model.cfg.n_layers)]
    assert not set(skipped) & set(qz.quantized_parameters(model))


def test_rows_that_are_no_whole_blocks(zoo: Any) -> None:
    model = lean_model(zoo("llama"), quantize="nf4")
    assert not qz.quantized_parameters(model)
    reasons = model.load_report.not_quantized
    assert reasons["blocks.0.attn.W_Q"] == "a row of 30 is not a whole number of blocks of 64"
    assert reasons["blocks.0.mlp.W_out"] == "a row of 44 is not a whole number of blocks of 64"
    assert len(qz.quantized_parameters(lean_model(zoo("llama"), quantize="8bit"))) == 14


@pytest.mark.parametrize("kind", ["8bit", "nf4"])
def test_refactoring_runs_before_quantizing(kind: str, zoo: Any) -> None:
    folder = qz.build(zoo, "gpt2")
    flags = {"refactor_factored_attn_matrices": True}
    dense = dict(lean_model(folder, **flags).named_parameters())
    weights = qz.quantized_parameters(lean_model(folder, quantize=kind, **flags))
    assert len(weights) == 12
    for name, weight in weights.items():
        matrix = _as_matrix(name, dense[name])
        _assert_made_by_bitsandbytes(weight, matrix, {"8bit": "int8"}.get(kind, kind))


def test_from_a_model_in_memory(zoo: Any) -> None:
    folder = qz.build(zoo, "neox")
    from_disk = lean_model(folder, quantize="nf4")
    hf = reference.hf_model("neox", folder)
    from_memory = lean_model(folder, hf_model=hf, quantize="nf4")
    tokens = zoo_module.tokens("neox")
    assert torch.equal(from_disk(tokens), from_memory(tokens))
    assert from_memory.load_report.quantization == "nf4, quantized while loading"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["8bit", "nf4"])
def test_bytes_that_are_kept(kind: str, zoo: Any) -> None:
    """The peak is measured in a process of its own: `python -m benchmarks --only quantized`."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    folder = zoo("llama", **sizes, intermediate_size=4096)
    model = lean_model(folder, quantize=kind)
    report = model.load_report
    assert report.parameter_bytes == unique_bytes(model.parameters())
    dense_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert report.parameter_bytes < dense_bytes / (3.8 if kind == "8bit" else 6.5)
