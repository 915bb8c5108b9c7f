"""The format of AWQ, as AutoAWQ stores it in its version "gemm": `qweight`, `qzeros`, `scales`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tl_fastload.errors import ArgumentError
from tl_fastload.quantized.formats.base import Format, QuantizedBytes, damaged, describe
from tl_fastload.quantized.formats.gptq import NEEDED, any_pieces, group_size
from tl_fastload.quantized.formats.packed_bytes import AwqBytes, needed
from tl_fastload.quantized.spec import Spec, modules_in, unreadable

_BITS = 4
_PER_WORD = 32 // _BITS


@dataclass(frozen=True)
class AwqSpec(Spec):
    """How AWQ stores a checkpoint.

    Attributes:
        group_size: columns with one scale; -1 for all of a row.
    """

    group_size: int = 128


class Awq(Format):
    """What AutoAWQ quantizes to 4 bits, dequantized at use."""

    name = "AWQ"
    kinds = ("awq",)
    stores = (AwqBytes,)
    spec = AwqSpec
    pieces: ClassVar[Mapping[str, str]] = dict.fromkeys((f".{name}" for name in NEEDED), ".weight")

    def declared(self, fields: Mapping[str, Any]) -> Spec | None:
        if fields.get("quant_method") != "awq":
            return None
        said = (fields.get(name) for name in ("version", "checkpoint_format", "format"))
        version = str(next(filter(None, said), "gemm")).lower()
        if version != "gemm":
            raise unreadable(
                f"AWQ weights in the version {version!r}, which is packed for one kernel,", "'gemm'"
            )
        bits = fields.get("bits", fields.get("w_bit", _BITS))
        if bits != _BITS:
            raise unreadable(f"AWQ weights of {bits} bits", f"of {_BITS}")
        if fields.get("zero_point") is False:
            raise ArgumentError(
                "the quantization_config of AWQ says zero_point: false, which the version 'gemm' "
                "does not have. Correct config.json, or take another checkpoint."
            )
        return AwqSpec(
            "awq",
            modules_in(fields, "modules_to_not_convert"),
            group_size=group_size(fields.get("group_size", fields.get("q_group_size"))),
        )

    def assemble(self, pieces: Mapping[str, torch.Tensor], spec: Any) -> QuantizedBytes:
        words, zeros, scales = needed(pieces, NEEDED)
        columns, rows = words.shape[0], words.shape[1] * _PER_WORD
        if scales.shape[1] != rows:
            raise damaged(
                f"qweight {describe(words)} packs {rows} outputs, and scales {describe(scales)} "
                f"are of {scales.shape[1]}"
            )
        size = max(columns, 1) if spec.group_size == -1 else spec.group_size
        return AwqBytes(words.t(), scales.t(), (rows, columns), _BITS, size, "awq", zeros.t())

    def sample(self, kind: str, device: torch.device) -> QuantizedBytes:
        return self.assemble(any_pieces(device, 128, 8), AwqSpec(kind, group_size=64))
