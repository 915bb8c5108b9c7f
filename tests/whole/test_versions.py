"""The road that each torch takes, and arguments that not every TransformerLens has."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from tests.support import environments, reference
from tests.support import zoo as bed
from tests.support.comparison import differences, lean_model, log_probs, stock_model, values
from tests.support.counting import AllocatedBytes
from tests.support.zoo import CASES, tokens
from tl_fastload.cli.bench.loads import blank_tokenizer
from tl_fastload.errors import ArgumentError, StrategyError, UnsupportedArchitectureError
from tl_fastload.placement.placer import Placer

pytestmark = pytest.mark.parity

TORCH = environments.installed("torch")
ASSIGNS = Version(TORCH) >= Version("2.1")
RAW = reference.NO_PROCESSING


@pytest.mark.parametrize("flags", [{}, RAW], ids=["processed", "unprocessed"])
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "mixtral", "attn-only"])
def test_auto_takes_the_road_that_this_torch_has(
    case_id: str, flags: dict[str, bool], zoo: Any
) -> None:
    folder = zoo(case_id)
    report = lean_model(folder, **flags).load_report
    assert report.strategy == ("assign" if ASSIGNS else "copy")
    assert f"torch {report.torch_version}" in report.reason
    assert report.torch_version.partition("+")[0] == TORCH
    if not ASSIGNS:
        assert "2.1" in report.reason
        assert report.mapped_bytes == 0
    elif flags and case_id != "attn-only":
        assert report.mapped_bytes > 0


@pytest.mark.parametrize("flags", [{}, RAW], ids=["processed", "unprocessed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "mixtral", "bloom", "solu"])
def test_copying_gives_stocks_numbers(
    case_id: str, dtype: torch.dtype, flags: dict[str, bool], zoo: Any
) -> None:
    folder = zoo(case_id)
    lean = lean_model(folder, dtype=dtype, strategy="copy", **flags)
    assert lean.load_report.strategy == "copy"
    apart = differences(stock_model(case_id, folder, dtype=dtype, **flags), lean)
    assert apart == []


# Large enough for matrices to matter beside the reader's buffer of 4 MiB.
WIDE: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 4000, "n_embd": 512, "n_head": 8, "n_layer": 8},
    "llama-gqa": {
        "vocab_size": 4000,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
    },
}


@pytest.fixture
def placing(monkeypatch: pytest.MonkeyPatch) -> AllocatedBytes:
    """Counts what placing allocates: the memory of the parameters, and on the way to them."""
    counted, place = AllocatedBytes(), Placer.place

    def count(self: Placer, recipes: Any) -> None:
        with counted:
            place(self, recipes)

    monkeypatch.setattr(Placer, "place", count)
    return counted


@pytest.mark.parametrize(
    ("case_id", "dtype"),
    [("gpt2", "float32"), ("llama-gqa", "float32"), ("llama-gqa", "bfloat16")],
)
def test_one_copy_in_memory(case_id: str, dtype: str, zoo: Any, placing: AllocatedBytes) -> None:
    folder = zoo(case_id, dtype=getattr(torch, dtype), **WIDE[case_id])
    lean = lean_model(folder, dtype=dtype)
    assert placing.peak < (1.05 if ASSIGNS else 1.15) * lean.load_report.parameter_bytes


@pytest.mark.parametrize("case_id", WIDE)
def test_mapped_where_torch_assigns(case_id: str, zoo: Any, placing: AllocatedBytes) -> None:
    lean = lean_model(zoo(case_id, **WIDE[case_id]), mmap=True, **RAW)
    assert placing.peak < (0.05 if ASSIGNS else 1.15) * lean.load_report.parameter_bytes


@pytest.mark.parametrize("case_id", WIDE)
def test_a_live_model_is_processed_in_its_own_memory(
    case_id: str, zoo: Any, placing: AllocatedBytes
) -> None:
    lean = lean_model(zoo(case_id, **WIDE[case_id]), mmap=False, **RAW)
    weights, most_bytes = values(lean), 1.15 * lean.load_report.parameter_bytes
    for process in (lean.process_weights_, lambda: lean.load_and_process_state_dict(weights)):
        placing.peak = 0
        process()
        assert most_bytes / 1.15 < placing.peak < most_bytes  # the model itself is counted


def test_assign_is_refused_where_torch_cannot(zoo: Any) -> None:
    with pytest.raises(StrategyError, match=f"or newer, this is {re.escape(TORCH)}"):
        lean_model(zoo("gpt2"), strategy="assign")


def test_assign_where_torch_can(zoo: Any) -> None:
    assert lean_model(zoo("gpt2"), strategy="assign").load_report.reason == "as asked for"


def test_quantized_weights_are_refused_where_torch_cannot(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("llama-gqa")
    saved = Path(shutil.copytree(folder, tmp_path / "saved"))
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (saved / "config.json").write_text(json.dumps(config))
    for source, arguments in (
        (folder, {"quantize": "8bit"}),
        (folder, {"quantize": "nf4"}),
        (folder, {"load_in_4bit": True}),
        (saved, {}),
    ):
        with pytest.raises(
            ArgumentError, match=f"need torch .* or newer, this is {re.escape(TORCH)}"
        ):
            lean_model(source, **arguments)


@pytest.mark.parametrize("kind", ["8bit", "nf4"])
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
def test_quantized_while_loading(case_id: str, kind: str, zoo: Any) -> None:
    sizes = {"n_embd": 192} if case_id == "gpt2" else {"hidden_size": 384, "head_dim": 64}
    folder = zoo(case_id, **sizes)
    dense, lean = lean_model(folder), lean_model(folder, quantize=kind)
    weight = lean.blocks[0].attn.W_Q
    assert type(weight).__name__ == "QuantizedTensor"
    assert lean.load_report.parameter_bytes < 0.7 * dense.load_report.parameter_bytes
    apart = (weight.dequantize() - dense.blocks[0].attn.W_Q).norm() / weight.dequantize().norm()
    assert apart < (0.02 if kind == "8bit" else 0.15)
    assert log_probs(lean, case_id).isfinite().all()


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "solu", "attn-only"])
def test_a_processed_model_is_processed_again_after_an_edit(case_id: str, zoo: Any) -> None:
    """TransformerLens 2 has no norms left to fold then, and its own method fails."""
    lean = lean_model(zoo(case_id), **RAW)
    lean.process_weights_()
    with torch.no_grad():
        lean.unembed.W_U.mul_(1.5).add_(0.25)
    wanted = log_probs(lean, case_id)
    lean.process_weights_()
    assert lean.unembed.W_U.mean(-1).abs().max() < 1e-6
    assert (log_probs(lean, case_id) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("case_id", ["llama-gqa", "neox"])
def test_another_context_length(case_id: str, zoo: Any) -> None:
    """TransformerLens below 2.17 has no `n_ctx=`."""
    folder = zoo(case_id)
    lean = lean_model(folder, n_ctx=tokens(case_id).shape[1])
    assert lean.cfg.n_ctx == tokens(case_id).shape[1]
    apart = (log_probs(lean, case_id) - log_probs(lean_model(folder), case_id)).abs().max()
    assert apart < 1e-5


def test_defaults_are_those_of_this_transformer_lens(zoo: Any) -> None:
    folder = zoo("gpt2", tokenizer=True)
    stock, lean = stock_model("gpt2", folder), lean_model(folder)
    assert lean.cfg.default_prepend_bos == stock.cfg.default_prepend_bos
    assert lean.tokenizer.padding_side == stock.tokenizer.padding_side
    left = lean_model(folder, default_padding_side="left", default_prepend_bos=False)
    assert left.tokenizer.padding_side == "left"
    assert left.cfg.default_prepend_bos is False


@pytest.mark.parametrize("case_id", ["olmo", "gemma3"])
def test_what_transformer_lens_lacks_is_said(case_id: str, tmp_path: Path) -> None:
    case = CASES[case_id]
    model_type = {"olmo": "olmo", "gemma3": "gemma3_text"}[case_id]
    raw = {"architectures": [case.architecture], "model_type": model_type, **case.config}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedArchitectureError, match="newer TransformerLens than the inst"):
        lean_model(tmp_path)


def test_the_tokenizer_that_benchmarks_use(zoo: Any) -> None:
    """In every version it is taken as it is: loading one is not measured."""
    given = blank_tokenizer()
    assert lean_model(zoo("gpt2"), tokenizer=given).tokenizer is given


def test_checkpoints_that_torch_saved(zoo: Any) -> None:
    """Where torch cannot map them, they are read; the numbers are the same."""
    for case_id in ("gpt2", "santacoder"):
        plain, saved = lean_model(zoo(case_id)), lean_model(zoo(case_id, bin=True))
        assert differences(plain, saved, cfg_apart=("tokenizer_name", "model_name")) == []
    bed.read_weights(zoo("gpt2", bin=True))  # the file is as it was, and can be read again
