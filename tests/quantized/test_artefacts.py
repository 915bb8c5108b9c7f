"""What earlier versions wrote still loads: `artefacts/` was written before formats were modules.

A Llama of one layer, quantized to nf4 while it was loaded: as `save_lean` copies it, and pickled
whole; and single matrices of every kind. They are not to be written anew.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import tl_fastload.quantized
from tests.support import quantized_zoo as qz
from tests.support.comparison import lean_model
from tests.support.quantized_kinds import assert_near
from tl_fastload.quantized.formats.bitsandbytes import BitsAndBytesSpec
from tl_fastload.source.torch_files import read_torch_files

ARTEFACTS = Path(__file__).parent / "artefacts"
EXPECTED = load_file(ARTEFACTS / "expected.safetensors")


def test_matrices_in_a_torch_file() -> None:
    assert tl_fastload.quantized.rebuild.__module__ == "tl_fastload.quantized"
    found: Any = read_torch_files((ARTEFACTS / "state_dict.pt",)).tensors
    assert {name: tensor.content.stored.kind for name, tensor in found.items()} == {
        "int8": "int8",
        "nf4": "nf4",
        "fp4-double": "fp4",
    }
    for name, tensor in found.items():
        assert tensor.dtype == EXPECTED[name].dtype
        assert_near(tensor.dequantize(), EXPECTED[name], 1e-6)
    assert found["int8"].content.stored.threshold == 4.0
    assert found["nf4"].content.compute_dtype == torch.float32
    assert found["fp4-double"].content.center_out


def test_a_copy_and_a_pickled_model(tmp_path: Path) -> None:
    copied = lean_model(shutil.copytree(ARTEFACTS / "copy", tmp_path / "copy"))
    pickled = torch.load(ARTEFACTS / "model.pt", weights_only=False)
    spec = pickled._quantization
    assert spec == copied._quantization == BitsAndBytesSpec("nf4")
    for model in (copied, pickled):
        with torch.no_grad():
            assert_near(model(torch.arange(8)[None]), EXPECTED["logits"], 1e-3)
    theirs = qz.quantized_parameters(pickled)
    assert len(theirs) == 7
    for name, value in qz.quantized_parameters(copied).items():
        (mine, plain), (other, wanted) = value.content.parts(), theirs[name].content.parts()
        assert (mine.keys(), plain) == (other.keys(), wanted)
        assert all(torch.equal(mine[part], other[part]) for part in mine), name
    pickled.save_lean(tmp_path / "again")
    assert lean_model(tmp_path / "again").load_report.quantization == "nf4, as saved"
