"""Models in GGUF files: the numbers of transformers' models with gguf's own values, on bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import gguf_files as files
from tests.support.comparison import STEPS, lean_model
from tl_fastload.quantized import QuantizedTensor

TOKENS = torch.randint(3, 100, (2, 13), generator=torch.Generator().manual_seed(1))
RAW = dict.fromkeys(STEPS, False)


def quantized(model: Any) -> dict[str, QuantizedTensor]:
    return {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def log_probs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).log_softmax(-1)
    return found


@pytest.mark.parametrize("case_id", files.CASES)
def test_log_probabilities_are_those_of_transformers(case_id: str, tmp_path: Path) -> None:
    written = files.write(case_id, tmp_path / "model.gguf")
    expected = files.log_probs(written.model, TOKENS)
    blocks = {n: t for n, t in written.types.items() if t not in ("F32", "F16", "BF16")}
    for flags in (RAW, {}):
        model = lean_model(written.path, **flags)
        assert model.load_report.quantization == "gguf, as in the checkpoint"
        assert float((log_probs(model) - expected).abs().max()) < 1e-4
        held = quantized(model)
        assert {"embed.W_E", "unembed.W_U"} <= held.keys()
        # Every type of the file is kept, so that none was made ordinary on the way.
        kept = {tensor.content.stored.ggml_type for tensor in held.values()}  # type: ignore[attr-defined]
        assert kept == set(blocks.values())
    if case_id not in ("llama", "mixtral", "gemma2", "gpt-oss"):
        return  # one of each kind
    dense = lean_model(written.path, dequantize=True)
    assert quantized(dense) == {}
    assert float((log_probs(dense) - expected).abs().max()) < 1e-4
