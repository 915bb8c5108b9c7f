"""The format of torchao's tensors of bytes, as transformers saves them: `_weight_qdata` with
`_weight_scale` and perhaps `_weight_zero_point`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from tl_fastload.errors import ArgumentError, QuantizationError
from tl_fastload.quantized.formats.base import Format, QuantizedBytes, describe
from tl_fastload.quantized.formats.fp8 import (
    ZeroPointSpec,
    codes_and_scales,
    rounded_besides,
    stored_zeros,
)
from tl_fastload.quantized.formats.scaled_bytes import (
    FLOAT8,
    ScaledBytes,
    scaled_bytes,
    scaled_sample,
)
from tl_fastload.quantized.spec import Spec, modules_in, unreadable

_KIND = "torchao"
_CODES = FLOAT8 | {torch.int8}
_TENSORS = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
# torchao's configurations whose tensors are read -> how it scales activations, if it rounds them.
_CONFIGS = {
    "Int8WeightOnlyConfig": None,
    "Float8WeightOnlyConfig": None,
    "IntxWeightOnlyConfig": None,
    "Int8DynamicActivationInt8WeightConfig": "dynamic",
    "Int8DynamicActivationIntxWeightConfig": "dynamic",
    "Float8DynamicActivationFloat8WeightConfig": "dynamic",
    "Int8StaticActivationInt8WeightConfig": "static",
    "Float8StaticActivationFloat8WeightConfig": "static",
}
_TABLES = ("FqnToConfig", "ModuleFqnToConfig")


class Torchao(Format):
    """What torchao quantizes to 8 bits, or to fewer in a byte each; dequantized at use."""

    name = "torchao"
    kinds = (_KIND,)
    stores = (ScaledBytes,)
    spec = ZeroPointSpec  # blocks are what the shapes of scales say
    pieces: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (f"._weight_{name}" for name in ("qdata", "scale", "zero_point", "act_pre_scale")),
        ".weight",
    )
    ignored = frozenset({"._weight_act_quant_scale", "._weight_act_quant_zero_point"})
    undeclared: ClassVar[Mapping[str, str]] = {
        "_weight_qdata": '{"quant_method": "torchao", "quant_type": ...}, with the type that the '
        "checkpoint was saved with"
    }
    remedy = 'pip install --upgrade "torch>=2.1"'

    def declared(self, fields: Mapping[str, Any]) -> Spec | None:
        if fields.get("quant_method") != "torchao":
            return None
        configs = list(_configs_in(fields.get("quant_type")))
        if not configs:
            raise ArgumentError(
                f"the quantization_config of torchao has quant_type={fields.get('quant_type')!r}, "
                "which names no configuration of torchao, or is of a version whose files are "
                "pickles. Save the model again with a current torchao, or take the unquantized "
                "checkpoint with quantize=."
            )
        unknown = sorted({str(config["_type"]) for config in configs} - _CONFIGS.keys())
        if unknown:
            raise unreadable(
                f"torchao weights of {' and '.join(unknown)}", f"of {', '.join(_CONFIGS)}"
            )
        scales = [_CONFIGS[config["_type"]] for config in configs]
        return ZeroPointSpec(
            _KIND,
            modules_in(fields, "modules_to_not_convert"),
            rounds=rounded_besides(next(filter(None, scales), None)),
            is_symmetric=all(_is_symmetric(config) for config in configs),
        )

    def assemble(self, pieces: Mapping[str, torch.Tensor], spec: Any) -> QuantizedBytes:
        codes, scales = codes_and_scales(pieces, _CODES, _KIND)
        # Floats among asymmetric integers have none.
        is_symmetric = spec.is_symmetric or codes.dtype != torch.int8
        return _bytes_of(codes, scales, stored_zeros(pieces, "_weight_zero_point", is_symmetric))

    def of_layer(self, module: Any) -> tuple[QuantizedBytes, torch.dtype | None] | None:
        weight: Any = module._parameters.get("weight")
        if not type(weight).__module__.startswith("torchao."):
            return None
        name = type(weight).__name__
        if name not in _TENSORS or getattr(weight, "act_pre_scale", None) is not None:
            raise QuantizationError(
                f"torchao's {name} cannot be read, only {', '.join(_TENSORS)} that do not scale "
                "activations. Take the unquantized model, with quantize= if it is too large."
            )
        zeros = getattr(weight, "zero_point", None)
        if zeros is not None and not bool(zeros.any()):
            zeros = None
        return _bytes_of(weight.qdata, weight.scale, zeros), None

    def sample(self, kind: str, device: torch.device) -> QuantizedBytes:
        return scaled_sample("int8", kind, device)


def _bytes_of(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> ScaledBytes:
    """The bytes of a matrix whose blocks are as large as the scales are few."""
    if codes.dim() != 2 or scales.dim() not in (0, 2):
        raise QuantizationError(
            f"codes and scales are matrices, not {describe(codes)} and {describe(scales)}."
        )
    grid = scales.shape if scales.dim() else (1, 1)
    sizes = [side // max(count, 1) for side, count in zip(codes.shape, grid, strict=True)]
    return scaled_bytes(codes, scales, (max(sizes[0], 1), max(sizes[1], 1)), _KIND, zeros)


def _configs_in(named: Any) -> Iterator[Mapping[str, Any]]:
    """torchao's configurations in a `quant_type`, those for single modules included."""
    if isinstance(named, Mapping) and named.get("_type") not in (None, *_TABLES):
        yield named
    elif isinstance(named, Mapping):
        for value in named.values():
            yield from _configs_in(value)


def _is_symmetric(config: Mapping[str, Any]) -> bool:
    """Whether the weights of a configuration have no zero points."""
    settings = config.get("_data")
    settings = settings if isinstance(settings, Mapping) else {}
    said = [settings.get(name) for name in ("mapping_type", "weight_mapping_type")]
    said = [one.get("_data") if isinstance(one, Mapping) else one for one in said]
    return "ASYMMETRIC" not in map(str, said)
