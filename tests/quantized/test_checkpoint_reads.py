"""How much of a saved quantized checkpoint is read: every byte once, mapped or not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import quantized_zoo as qz
from tests.support import reference
from tests.support.comparison import lean_model
from tl_fastload.report.memory import unique_bytes
from tl_fastload.source.reader import FileReader

KINDS = ("int8", "nf4-double")


@pytest.mark.parametrize("flags", [{}, reference.NO_PROCESSING], ids=["processed", "unprocessed"])
@pytest.mark.parametrize(
    ("case_id", "kind"),
    [
        *itertools.product(("gpt2", "llama-gqa", "neox", "phi3-gqa", "qwen2"), KINDS),
        *(("phi3-gqa", "fp8"), ("neox", "ct-int-groups"), ("gpt-oss", "mxfp4")),
        *(("gpt2", "gptq"), ("phi3-gqa", "awq")),
    ],
)
def test_every_byte_is_read_once(
    case_id: str, kind: str, flags: Any, zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Path = qz.saved(qz.build(zoo, case_id), kind)
    read: list[int] = []
    original = FileReader.read

    def counted(reader: FileReader, path: Path, offset: int, out: torch.Tensor) -> None:
        read.append(out.numel())
        original(reader, path, offset, out)

    monkeypatch.setattr(FileReader, "read", counted)
    model = lean_model(folder, mmap=False, **flags)
    size = (folder / "model.safetensors").stat().st_size
    # Tied embeddings are two parameters, read one after the other; norms go into several.
    tied = sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if name in ("embed.W_E", "pos_embed.W_pos")
    )
    assert sum(read) < 1.02 * size + tied
    assert sum(read) > 0.9 * size
    # Rows of one matrix that several parameters show are held once.
    assert unique_bytes(list(model.parameters())) < 1.1 * size + 2 * tied
