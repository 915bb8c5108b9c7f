"""GGUF's blocks against the gguf package, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Ggml
from gguf import quants

from tl_fastload.errors import QuantizationError
from tl_fastload.quantized import formats
from tl_fastload.quantized.formats.gguf import GgufBytes
from tl_fastload.quantized.spec import Spec
from tl_fastload.source.ggml_types import BLOCK_TYPES, REFUSED, TYPES


def test_types_are_those_of_the_gguf_package() -> None:
    for number, kind in TYPES.items():
        assert Ggml(number).name == kind.name
        assert gguf.GGML_QUANT_SIZES[Ggml(number)] == (kind.size, kind.nbytes)
    # Every other type that there is has a name in the error.
    assert {int(one) for one in Ggml} - TYPES.keys() <= REFUSED.keys()


@pytest.mark.parametrize("ggml_type", BLOCK_TYPES)
def test_values_are_those_of_the_gguf_package(ggml_type: str) -> None:
    """Of bytes of all kinds, so that scales are NaN and infinite, too."""
    block = BLOCK_TYPES[ggml_type]
    raw = np.random.default_rng(0).integers(0, 256, (96, 3 * block.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(quants.dequantize(raw, Ggml[ggml_type]))
    stored = GgufBytes(torch.from_numpy(raw), ggml_type)
    assert stored.shape == tuple(expected.shape)
    values = stored.dense(torch.float32)
    assert torch.equal(values.isnan(), expected.isnan())
    same = (values.view(torch.int32) == expected.view(torch.int32)) | expected.isnan()
    assert bool(same.all())
    half = stored.dense(torch.bfloat16)
    assert torch.equal(half.nan_to_num(), expected.bfloat16().nan_to_num())
    # One block, at an odd address.
    odd = torch.from_numpy(np.concatenate([raw[:1, :1], raw[:1, : block.nbytes]], 1))[:, 1:]
    one = GgufBytes(odd, ggml_type).dense(torch.float32)
    assert torch.equal(one.nan_to_num(), expected[:1, : block.size].nan_to_num())
    some = torch.tensor([5, 3, 3, 90])
    assert torch.equal(stored.rows(some).packed, stored.packed[some])
    run = stored.rows(torch.arange(8, 24))
    assert run.packed.data_ptr() == stored.packed[8:].data_ptr()  # shared


def test_what_is_no_matrix_of_blocks_is_refused() -> None:
    rows = torch.zeros(4, 34, dtype=torch.uint8)
    with pytest.raises(QuantizationError, match=r"one of the types Q4_0.*not IQ4_NL"):
        GgufBytes(rows, "IQ4_NL")
    for wrong in (rows[:, :33], rows.to(torch.int8), rows[0]):
        with pytest.raises(QuantizationError, match="Q8_0 are blocks of 34 bytes, not"):
            GgufBytes(wrong, "Q8_0")
    assemble = formats.of_kind("gguf").assemble
    with pytest.raises(QuantizationError, match="stored Q8_0 and as weight: one of them"):
        assemble({"Q8_0": rows, "weight": rows}, Spec("gguf"))
    with pytest.raises(QuantizationError, match="are matrices, not"):
        assemble({"Q8_0": rows[0]}, Spec("gguf"))
