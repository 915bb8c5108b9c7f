"""`adapter=` on a quantized base: dequantized, merged, and quantized again as peft does it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.support import adapters
from tests.support import quantized_zoo as qz
from tests.support.comparison import lean_model
from tl_fastload import ArgumentError
from tl_fastload.huggingface.lora import merge
from tl_fastload.quantized import QuantizedTensor

KINDS = [("llama-gqa", "int8"), ("llama-gqa", "nf4-double"), ("gpt2", "int8"), ("gpt2", "nf4")]


def _adapter(zoo: Any, tmp_path: Path, case_id: str, **config: Any) -> tuple[Path, Path]:
    folder = qz.build(zoo, case_id)
    targets = ["c_attn", "c_proj"] if case_id == "gpt2" else ["q_proj", "down_proj"]
    config = {"target_modules": targets, **config}
    return folder, adapters.for_case(case_id, folder, tmp_path / "adapter", **config)


def _same_bytes(found: Any, wanted: Any) -> None:
    """Bytes and scales of every quantized parameter, and the values of the others."""
    others = dict(wanted.named_parameters())
    for name, value in found.named_parameters():
        if isinstance(value, QuantizedTensor):
            one, other = value.content.stored.tensors(), others[name].content.stored.tensors()
            assert one.keys() == other.keys()
            assert all(torch.equal(one[k].flatten(), other[k].flatten()) for k in one), name
        else:
            assert torch.allclose(value, others[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["plain", "dora"])
@pytest.mark.parametrize(("case_id", "kind"), KINDS)
def test_requantized_as_peft_does(
    zoo: Any, tmp_path: Path, case_id: str, kind: str, config: dict[str, Any]
) -> None:
    folder, adapter = _adapter(zoo, tmp_path, case_id, **config)
    hf = qz.hf_model(folder, kind)
    found = lean_model(folder, hf_model=hf, adapter=adapter, requantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(hf), adapter).merge_and_unload()
    _same_bytes(found, lean_model(folder, hf_model=merged))
    assert adapters.gaps_of_dense(found, lean_model(folder, hf_model=hf))
    assert found.load_report.quantization is not None


def test_a_saved_checkpoint(zoo: Any, tmp_path: Path) -> None:
    folder, adapter = _adapter(zoo, tmp_path, "llama-gqa")
    hf = qz.hf_model(folder, "int8")
    saved = qz.saved(folder, "int8")
    found = lean_model(saved, adapter=adapter, requantize=True)
    _same_bytes(found, lean_model(folder, hf_model=hf, adapter=adapter, requantize=True))


def test_parts_of_a_fused_matrix_are_updated_once(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, adapter = _adapter(zoo, tmp_path, "gpt2", target_modules=["c_attn"])
    made = []
    original = merge._updated
    monkeypatch.setattr(merge, "_updated", lambda *a: (made.append(a[0].name), original(*a))[1])
    lean_model(qz.saved(folder, "int8"), adapter=adapter, requantize=True)
    assert set(made) == {f"transformer.h.{n}.attn.c_attn.weight" for n in range(2)}
    assert len(made) <= 2 * len(set(made)), made  # the key shifts come before the matrices


def test_quantized_weights_need_to_be_told(zoo: Any, tmp_path: Path) -> None:
    folder, adapter = _adapter(zoo, tmp_path, "llama-gqa")
    saved = qz.saved(folder, "int8")
    with pytest.raises(ArgumentError, match="requantize=True"):
        lean_model(saved, adapter=adapter)
    with pytest.raises(ArgumentError, match="has no adapter"):
        lean_model(saved, requantize=True)
    with pytest.raises(ArgumentError, match="not quantized"):
        lean_model(folder, adapter=adapter, requantize=True)
