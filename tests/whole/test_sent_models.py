"""Models whose bytes went over a bus, to be cast and put in order behind it, are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.buses import PromptBus
from tests.support.comparison import differences, lean_model
from tests.support.reference import NO_PROCESSING
from tl_fastload.source import reader


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "mixtral", "bloom", "neox"])
def test_a_sent_model_is_the_same(
    case_id: str, dtype: torch.dtype, zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Path = zoo(case_id)
    for options in ({}, {"strategy": "copy"}, {"strategy": "copy", **NO_PROCESSING}):
        plain = lean_model(folder, dtype=dtype, **options)
        with monkeypatch.context() as patch:
            buses: list[PromptBus] = []

            def bus_to(device: torch.device, buses: list[PromptBus] = buses) -> PromptBus:
                buses.append(PromptBus())
                return buses[-1]

            patch.setattr(reader, "bus_to", bus_to)
            patch.setattr(reader, "WINDOW_BYTES", 4096)
            sent = lean_model(folder, dtype=dtype, **options)
        assert buses
        assert buses[0].slots
        assert differences(plain, sent) == []
