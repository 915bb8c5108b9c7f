"""GGUF files in a bridge, raw and processed: transformers' numbers, on bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.bridge_stock import quiet
from tl_fastload import LeanTransformerBridge
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.quantized.formats.gguf import GgufBytes

pytest.importorskip("gguf")  # which only the usual environment has

TOKENS = torch.randint(3, 100, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case_id", ["llama", "gemma2", "mixtral", "gpt-oss"])
def test_log_probabilities_are_those_of_transformers(
    case_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support import gguf_files as files

    path, experts = tmp_path / "m.gguf", case_id in ("mixtral", "gpt-oss")
    # llama.cpp gives both halves of what transformers has in one matrix one type.
    types = (lambda _, name: "Q4_K" if "_exps" in name else "Q6_K") if experts else None
    written = files.write(case_id, path, types, files.sentencepiece, vocab_size=280)
    expected = files.log_probs(written.model, TOKENS)
    loads: tuple[Any, ...] = (
        LeanTransformerBridge.boot_transformers_lean,
        LeanTransformerBridge.from_pretrained_lean,
    )
    for load in loads:
        with quiet():
            bridge = load(path, device="cpu")
            with torch.no_grad():
                found = bridge(TOKENS).log_softmax(-1)
        assert float((found - expected).abs().max()) < 1e-4
        assert bridge.load_report.quantization == "gguf, as in the checkpoint"
        held = sum(isinstance(p, QuantizedTensor) for p in bridge.parameters())
        assert held == 14 if experts else held >= 8
        why = bridge.load_report.not_quantized
        assert not [name for name in why if name.endswith("_proj")]
        if experts:
            _assert_only_their_experts(bridge, monkeypatch)
        assert bridge.tokenizer("hello")["input_ids"][-1] == 269 - case_id.startswith("gemma")


def _assert_only_their_experts(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token goes to two of three experts, and two are decoded."""
    rows: list[int] = []
    decode = GgufBytes.decode

    def spy(stored: GgufBytes, first: int, last: int, out: torch.Tensor) -> None:
        if stored.shape == (1024, 256):  # both halves of an expert
            rows.append(last - first)
        decode(stored, first, last, out)

    with monkeypatch.context() as patch, quiet(), torch.no_grad():
        patch.setattr(GgufBytes, "decode", spy)
        bridge(TOKENS[:1, :1])
    assert sum(rows) == 2 * 1024 * bridge.cfg.n_layers
