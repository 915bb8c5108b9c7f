"""GGUF files in a bridge, raw and processed: transformers' numbers, on bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.bridge_stock import quiet
from tl_fastload import LeanTransformerBridge
from tl_fastload.quantized import QuantizedTensor

pytest.importorskip("gguf")  # which only the usual environment has

TOKENS = torch.randint(3, 100, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case_id", ["llama", "gemma2", "mixtral", "gpt-oss"])
def test_log_probabilities_are_those_of_transformers(case_id: str, tmp_path: Path) -> None:
    from tests.support import gguf_files as files

    path = tmp_path / "m.gguf"
    written = files.write(case_id, path, tokens=files.sentencepiece, vocab_size=280)
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
        assert sum(isinstance(p, QuantizedTensor) for p in bridge.parameters()) >= 8
        assert bridge.tokenizer("hello")["input_ids"][-1] == 269 - case_id.startswith("gemma")
