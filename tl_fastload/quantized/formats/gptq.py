"""The format of GPTQ, as AutoGPTQ, gptqmodel and transformers store it: `qweight`, `qzeros`,
`scales`, `g_idx`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tl_fastload.errors import QuantizationError
from tl_fastload.quantized.formats.base import Format, QuantizedBytes
from tl_fastload.quantized.formats.packed_bytes import (
    BITS,
    PackedBytes,
    any_words,
    column_groups,
    needed,
)
from tl_fastload.quantized.spec import Spec, modules_in, table_in, unreadable, wrong_setting

NEEDED = ("qweight", "qzeros", "scales")
# Format of a checkpoint -> what is added to the zero points that it stores.
_SHIFTS = {"gptq": 1, "gptq_v2": 0}
_USUAL_GROUP = 128
_GROUPS_SAID = ("g_idx", "desc_act or dynamic", "desc_act: false", "true")


@dataclass(frozen=True)
class GptqSpec(Spec):
    """How GPTQ stores a checkpoint.

    Attributes:
        bits: of a code.
        group_size: columns with one scale; -1 for all of a row.
        zero_shift: added to stored zero points: 1 in the first version of the format.
        is_reordered: whether columns were quantized in another order, and `g_idx` has the group of
            each.
        is_mixed: whether single layers have other bits and groups, which their shapes say.
    """

    bits: int = 4
    group_size: int = _USUAL_GROUP
    zero_shift: int = 1
    is_reordered: bool = False
    is_mixed: bool = False


class Gptq(Format):
    """What AutoGPTQ and gptqmodel quantize, dequantized at use."""

    name = "GPTQ"
    kinds = ("gptq",)
    stores = (PackedBytes,)
    spec = GptqSpec
    pieces: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (*(f".{name}" for name in NEEDED), ".g_idx"), ".weight"
    )
    foreign: ClassVar[Mapping[str, str]] = {
        "qweight": "the layer may have put its bytes into the order of its kernel"
    }
    undeclared: ClassVar[Mapping[str, str]] = {
        "g_idx": '{"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false}, with '
        "the numbers of its quantize_config.json"
    }

    def declared(self, fields: Mapping[str, Any]) -> Spec | None:
        if fields.get("quant_method") != "gptq":
            return None
        _check_version(fields)
        bits, size = fields.get("bits"), group_size(fields.get("group_size"))
        if type(bits) is not int:
            raise wrong_setting("bits", bits, "no number of bits")
        if bits not in BITS:
            raise unreadable(f"GPTQ weights of {bits} bits", " or ".join(map(str, BITS)))
        return GptqSpec(
            "gptq",
            modules_in(fields, "modules_to_not_convert"),
            bits=bits,
            group_size=size,
            zero_shift=_SHIFTS[_version(fields)],
            is_reordered=bool(fields.get("desc_act")),
            is_mixed=_is_mixed(fields.get("dynamic")),
        )

    def assemble(self, pieces: Mapping[str, torch.Tensor], spec: Any) -> QuantizedBytes:
        words, zeros, scales = needed(pieces, NEEDED)
        index = pieces.get("g_idx")
        columns = words.shape[0] * 32 // spec.bits if index is None else index.numel()
        bits, size = spec.bits, columns if spec.group_size == -1 else spec.group_size
        if spec.is_mixed:
            bits = words.shape[0] * 32 // max(columns, 1)
            size = -(-columns // max(len(scales), 1))
        size, is_reordered = max(size, 1), spec.is_reordered or spec.is_mixed
        groups = column_groups(index, len(scales), size, is_reordered, _GROUPS_SAID)
        shape = (words.shape[1], columns)
        made = PackedBytes(
            *(words.t(), scales.t(), shape, bits, size, "gptq", zeros.t(), spec.zero_shift, groups)
        )
        # The first version of the format stores a zero point less one. What stands for zero is then
        # the largest code, which libraries read as zero, as one more than that code, or with a
        # carry into the next zero point.
        stored, largest = made.zeros_apart(), (1 << bits) - 1
        if made.zero_shift and stored is not None and not stored.is_meta:
            count = int((stored == largest).sum())
            if count:
                raise QuantizationError(
                    f"{count} zero points are stored as {largest}, which the first version of the "
                    "GPTQ format leaves open: AutoGPTQ reads them as 0, kernels as "
                    f"{largest + 1}, gptqmodel changes the ones beside them. Take a checkpoint "
                    "that is symmetric or has the checkpoint_format gptq_v2."
                )
        return made

    def sample(self, kind: str, device: torch.device) -> QuantizedBytes:
        return self.assemble(any_pieces(device, 16, 64), GptqSpec(kind, group_size=64))


def any_pieces(device: torch.device, *shape: int) -> dict[str, torch.Tensor]:
    """Pieces of a 4-bit matrix [64, 128] in groups of 64 inputs, with all kinds of codes.

    Args:
        device: where they go.
        *shape: of `qweight`, int32.
    """
    pieces = {
        "qweight": any_words(*shape),
        "qzeros": torch.full((2, 8), 0x77777777, dtype=torch.int32, device="cpu"),
        "scales": torch.linspace(0.1, 1, 128, device="cpu").view(2, 64),
    }
    return {name: piece.to(device) for name, piece in pieces.items()}


def group_size(value: Any) -> int:
    """The group size of a configuration: columns, or -1 for whole rows.

    Raises:
        ArgumentError: it is neither.
    """
    size = _USUAL_GROUP if value is None else value
    if type(size) is not int or (size < 1 and size != -1):
        raise wrong_setting("group_size", value, "neither -1 nor a positive number")
    return size


def _version(fields: Mapping[str, Any]) -> str:
    return str(fields.get("checkpoint_format") or fields.get("format") or "gptq").lower()


def _check_version(fields: Mapping[str, Any]) -> None:
    """Raise for what is stored in another way."""
    version = "marlin" if fields.get("is_marlin_format") else _version(fields)
    if version not in _SHIFTS:
        raise unreadable(
            f"GPTQ weights in the checkpoint_format {version!r}, which was made for one kernel or "
            "is newer than this version,",
            " and ".join(_SHIFTS),
        )
    if str(fields.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
        raise unreadable(f"GPTQ weights packed into {fields['pack_dtype']}", "int32")
    rotation = fields.get("rotation") or table_in(fields, "meta").get("rotation")
    if rotation:
        raise unreadable(
            f"weights of a GPTQ checkpoint that rotates activations ({rotation!r}), which "
            "HookedTransformer does not,"
        )


def _is_mixed(dynamic: Any) -> bool:
    """Whether rules for single modules say more than that these are not quantized."""
    rules = dynamic if isinstance(dynamic, Mapping) else {}
    return any(rule and not str(name).startswith("-:") for name, rule in rules.items())
