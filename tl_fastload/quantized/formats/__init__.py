"""The formats of quantized weights, and who of them is meant. A new one is a module and a name in
`FORMATS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tl_fastload.errors import ArgumentError, QuantizationError, UnsupportedArchitectureError
from tl_fastload.quantized.formats.awq import Awq
from tl_fastload.quantized.formats.base import Format, QuantizedBytes
from tl_fastload.quantized.formats.bitsandbytes import BitsAndBytes
from tl_fastload.quantized.formats.compressed_tensors import CompressedTensors
from tl_fastload.quantized.formats.fp8 import Fp8
from tl_fastload.quantized.formats.gguf import Gguf
from tl_fastload.quantized.formats.gptq import Gptq
from tl_fastload.quantized.formats.mxfp4 import Mxfp4
from tl_fastload.quantized.formats.torchao import Torchao
from tl_fastload.quantized.spec import Spec, declared_fields

FORMATS: tuple[Format, ...] = (
    *(BitsAndBytes(), Fp8(), CompressedTensors(), Mxfp4(), Gptq(), Awq(), Torchao(), Gguf()),
)

NOWHERE = frozenset({"hqq", "quanto", "sinq"})
"""Methods whose checkpoints neither a format here nor transformers makes ordinary."""


def of_kind(kind: str) -> Format:
    """The format whose specs and bytes have a kind.

    Raises:
        QuantizationError: there is none.
    """
    known = {kind: format for format in FORMATS for kind in format.kinds}
    if kind not in known:
        raise QuantizationError(
            f"quantization is one of {', '.join(map(repr, known))}, not {kind!r}, which a newer "
            "tl_fastload may know."
        )
    return known[kind]


def bytes_class(tag: str) -> type[QuantizedBytes]:
    """The class of bytes that files name by a tag.

    Raises:
        QuantizationError: there is none.
    """
    known = {stored.tag: stored for format in FORMATS for stored in format.stores}
    if tag not in known:
        raise QuantizationError(
            f"quantized bytes of the unknown class {tag!r}: a newer tl_fastload wrote them. Update "
            "it."
        )
    return known[tag]


def make_spec(kind: str, **settings: Any) -> Spec:
    """The spec of a kind with the settings that its format has.

    Raises:
        QuantizationError: no such kind.
    """
    return of_kind(kind).spec(kind=kind, **settings)


def offered() -> dict[str, str]:
    """What `quantize=` may say -> kind, of all formats."""
    return {name: kind for format in FORMATS for name, kind in format.offered.items()}


def read_quantization(asked: Any) -> Spec | None:
    """Read `quantize=` or `quantization_config=`.

    Args:
        asked: None, one of `offered`, a `transformers.BitsAndBytesConfig`, or its dictionary.

    Raises:
        ArgumentError: for anything else.
    """
    if asked is None or asked is False:
        return None
    names = offered()
    if isinstance(asked, str):
        if asked not in names:
            raise ArgumentError(f"quantize={asked!r} is none of {', '.join(names)}.")
        return make_spec(names[asked])
    fields = asked if isinstance(asked, Mapping) else getattr(asked, "to_dict", dict)()
    if found := next(filter(None, (format.asked(fields) for format in FORMATS)), None):
        return found
    raise ArgumentError(
        f"{asked!r} says neither load_in_8bit nor load_in_4bit. Pass one of "
        f"{', '.join(names)}, or a BitsAndBytesConfig."
    )


def of_checkpoint(hf_config: Any, label: str) -> Spec | None:
    """The quantization that a checkpoint's configuration declares, or None.

    Raises:
        UnsupportedArchitectureError: no format here has that method.
    """
    spec = own_format(hf_config)
    method = method_of(hf_config)
    if spec is not None or method is None:
        return spec
    remedy = (
        "Pass dequantize=True to load it through transformers' own dequantization, or take the "
        "unquantized checkpoint with quantize=."
    )
    if method in NOWHERE:
        remedy = (
            "Nor does transformers make ordinary weights of its files: take the unquantized "
            "checkpoint, with quantize= if it is too large."
        )
    raise UnsupportedArchitectureError(
        f"{label} is quantized with {method}, whose bytes HookedTransformer cannot compute "
        f"with. {remedy}"
    )


def own_format(hf_config: Any) -> Spec | None:
    """How the format that reads a checkpoint says it is quantized; None if it is not, or if no
    format here reads it.

    Raises:
        ArgumentError: its configuration contradicts itself.
        UnsupportedArchitectureError: a variant of the format that is not read.
    """
    fields = declared_fields(hf_config)
    if fields is None:
        return None
    return next(filter(None, (format.declared(fields) for format in FORMATS)), None)


def method_of(hf_config: Any) -> str | None:
    """The method that a configuration says its weights are quantized with, such as "gptq"."""
    fields = declared_fields(hf_config)
    if fields is None:
        return None
    named = (format.name for format in FORMATS if format.declared(fields) is not None)
    return str(fields.get("quant_method") or next(named, "an unnamed method"))


def of_layer(
    module: torch.nn.Module, name: str
) -> tuple[QuantizedBytes, torch.dtype | None] | None:
    """The bytes of a quantized layer in memory, shared, and the dtype that it multiplies in if not
    the activations'; None for others.

    Args:
        module: any module of a transformers model.
        name: of the weight, for messages.

    Raises:
        QuantizationError: a quantized layer that cannot be read, or has no kernel here.
    """
    marks = {type(module).__name__, *module._buffers, *module._parameters}
    for format in FORMATS:
        for mark in marks & format.foreign.keys():
            raise QuantizationError(
                f"{name}: {format.foreign[mark]}. Pass the checkpoint's file, folder or name, not "
                "hf_model."
            )
        try:
            layer = format.of_layer(module)
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from error
        if layer is not None:
            return layer
    return None


def descriptions() -> tuple[str, ...]:
    """Ends of the names of tensors whose values say what other tensors are."""
    return tuple(piece for format in FORMATS for piece in format.descriptions)
