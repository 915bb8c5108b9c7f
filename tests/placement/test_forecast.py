"""Predicted memory against counted memory, on models large enough for matrices to matter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import tl_fastload
from tests.support.counting import AllocatedBytes
from tl_fastload import LeanHookedTransformer
from tl_fastload.placement.placer import Placer
from tl_fastload.placement.rehearsal import Forecast, _is_lent, forecast
from tl_fastload.quantized.formats import bitsandbytes_kernels
from tl_fastload.quantized.recipes import QuantizedSource

CPU = torch.device("cpu")
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 4000, "n_embd": 256, "n_head": 4, "n_inner": 1024},
    "neox": {"vocab_size": 4000, "hidden_size": 240, "intermediate_size": 1024},
    "llama-gqa": {"vocab_size": 4000, "hidden_size": 192, "intermediate_size": 704},
    "bloom": {"vocab_size": 4000, "hidden_size": 256, "n_head": 4},
    "mixtral": {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 704},
}
UNPROCESSED = dict.fromkeys(
    ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
)
WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "copied": {"strategy": "copy"},
    "read": {"mmap": False},
    "unprocessed": UNPROCESSED,
    "refactored": {"refactor_factored_attn_matrices": True, "fold_ln": False},
    "8bit": {"quantize": "8bit"},
    "nf4": {"quantize": "nf4", "dtype": "bfloat16"},
}


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Forecast, int]]:
    """Forecast and counted peak of every placing."""
    found: list[tuple[Forecast, int]] = []
    place = Placer.place

    def counted(self: Placer, recipes: Any) -> None:
        predicted = forecast(self, recipes)
        with AllocatedBytes() as count:
            place(self, recipes)
        found.append((predicted, count.peak))

    monkeypatch.setattr(Placer, "place", counted)
    return found


def _cases_and_ways() -> list[tuple[str, str]]:
    """Every way with GPT-2; with the others every way once more, beside another one each time."""
    # Rotary embeddings and ALiBi stand between the matrices that would be refactored.
    ways = [way for way in WAYS if way != "refactored"]
    first, *others = SIZES
    return [(first, way) for way in WAYS] + [
        (case, ways[(2 * number + step) % len(ways)])
        for number, case in enumerate(others)
        for step in range(3)
    ]


@pytest.mark.parametrize(("case", "way"), _cases_and_ways())
def test_a_forecast_is_what_is_counted(
    case: str, way: str, zoo: Any, placed: list[tuple[Forecast, int]]
) -> None:
    folder = zoo(case, **SIZES[case])
    model = LeanHookedTransformer.from_pretrained_lean(
        folder, device="cpu", progress=False, **WAYS[way]
    )
    predicted, counted = placed[0]
    total = predicted.peak_bytes.get(CPU, 0) + predicted.scratch_bytes
    report = model.load_report
    # Quantizing takes a copy and the codes of so many values, whatever the size of the model.
    pieces = 5 * bitsandbytes_kernels._PART_SIZE if "quantize" in WAYS[way] else 0
    assert total == pytest.approx(counted, rel=0.05, abs=max(pieces, 1000))
    assert sum(predicted.mapped_bytes.values()) == report.mapped_bytes

    plan = tl_fastload.plan(folder, device="cpu", **WAYS[way])
    parameters = plan.total_bytes - plan.parameter_bytes["buffers"]
    assert parameters == pytest.approx(report.parameter_bytes, rel=1e-3)
    assert plan.mapped_bytes == report.mapped_bytes
    assert plan.quantization == report.quantization
    assert (plan.parameter_bytes["quantized"] > 0) == ("quantize" in WAYS[way])


QUANTIZED: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_checkpoints(
    kind: str, zoo: Any, placed: list[tuple[Forecast, int]], tmp_path: Path
) -> None:
    config = transformers.BitsAndBytesConfig(**QUANTIZED[kind])
    dense = zoo("llama-gqa", **SIZES["llama-gqa"])
    hf = transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    hf.save_pretrained(tmp_path)
    for arguments in ({}, {"hf_model": hf}, {"mmap": False}, {"dequantize": True}):
        plan = tl_fastload.plan(tmp_path, device="cpu", **arguments)
        model = LeanHookedTransformer.from_pretrained_lean(
            tmp_path, device="cpu", progress=False, **arguments
        )
        predicted, counted = placed[-1]
        assert predicted.peak_bytes[CPU] == pytest.approx(counted, rel=0.05, abs=1000)
        parameters = plan.total_bytes - plan.parameter_bytes["buffers"]
        assert parameters == model.load_report.parameter_bytes
        assert (plan.parameter_bytes["quantized"] > 0) == ("dequantize" not in arguments)
        assert plan.stock_peak_host_bytes is None


def test_bytes_on_another_device_of_the_kind_take_memory_on_this_one() -> None:
    outline: Any = SimpleNamespace(shape=(2, 3))
    for home, device, is_there in (
        ("cuda:1", "cuda:1", True),
        ("cuda:1", "cuda:0", False),
        ("cuda:1", "cuda", False),
        ("cuda:0", "cuda", True),
        ("cpu", "cpu", True),
        ("meta", "cpu", True),
        ("cpu", "cuda:0", False),
    ):
        source = QuantizedSource(
            lambda: pytest.fail("read"), torch.float32, "w", outline, torch.device(home)
        )
        assert _is_lent(source, torch.device(device)) is is_there, (home, device)
