"""How ggml stores rows of numbers: plain ones, or blocks of a fixed size in bytes.

Numbers and sizes are those of `enum ggml_type` and of the block structures in llama.cpp's
`ggml-common.h`, as gguf-py's `GGML_QUANT_SIZES` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GgmlType:
    """One way to store a row.

    Attributes:
        name: as llama.cpp spells it.
        size: values in a block; a row is whole blocks.
        nbytes: of a block.
        dtype: of plain values; None for codes.
    """

    name: str
    size: int
    nbytes: int
    dtype: torch.dtype | None = None


_PLAIN = {
    0: GgmlType("F32", 1, 4, torch.float32),
    1: GgmlType("F16", 1, 2, torch.float16),
    28: GgmlType("F64", 1, 8, torch.float64),
    30: GgmlType("BF16", 1, 2, torch.bfloat16),
}
_BLOCKS = {
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    39: GgmlType("MXFP4", 32, 17),
}
BLOCK_TYPES: Mapping[str, GgmlType] = {one.name: one for one in _BLOCKS.values()}
"""The types whose rows are blocks of codes, by name."""
TYPES: Mapping[int, GgmlType] = {**_PLAIN, **_BLOCKS}
"""What is read, by the number in files."""
REFUSED: Mapping[int, str] = {
    **{4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS"},
    **{19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16"},
    **{26: "I32", 27: "I64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0"},
}
"""Types that are known and not read: number -> name."""
