"""Formats that are only read: what is missing, misshapen, contradictory or unknown is said before
any weight is read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import quantized_packed as packed
from tests.support import quantized_zoo as qz
from tests.support.comparison import lean_model
from tests.support.folders import edited_copy
from tl_fastload.errors import (
    ArgumentError,
    LeanLoadError,
    MissingWeightsError,
    QuantizationError,
    UnsupportedArchitectureError,
)
from tl_fastload.quantized import assemble
from tl_fastload.source.reader import FileSource

LAYER = "model.layers.1.mlp.down_proj"
EXPERTS = "model.layers.1.mlp.experts.down_proj"
Tensors = dict[str, torch.Tensor]
Make = Callable[..., Path]


@pytest.fixture
def make(zoo: Any, tmp_path: Path) -> Make:
    """`make(name, edit tensors, edit quantization_config)` -> a packed folder of its own."""

    def made(name: str, edit: Any = None, declare: Any = None) -> Path:
        case_id = "gpt-oss" if packed.PACKINGS[name].stacked else "llama-gqa"
        source = qz.saved(qz.build(zoo, case_id), name)
        return edited_copy(source, tmp_path / "model", edit, partial(declared, change=declare))

    def declared(fields: dict[str, Any], change: Any) -> None:
        if change is not None:
            change(fields["quantization_config"])
        if not fields["quantization_config"]:
            del fields["quantization_config"]

    return made


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("a weight was read")

    monkeypatch.setattr(FileSource, "read_into", refuse)
    monkeypatch.setattr(assemble, "from_bytes", refuse)


def _change(piece: str, change: Any = None, layer: str = LAYER, sign: str = ".") -> Any:
    """Take a piece away, or change it."""
    name = f"{layer}{sign}{piece}"

    def edit(tensors: Tensors) -> None:
        assert name in tensors
        value = tensors.pop(name)
        if change is not None:
            tensors[name] = change(value)

    return edit


def _of_experts(piece: str, change: Any = None) -> Any:
    return _change(piece, change, EXPERTS, "_")


def _both(tensors: Tensors) -> None:
    tensors[f"{LAYER}.weight_scale"] = torch.ones(1)


FLOAT8 = torch.float8_e4m3fn
PIECES = [
    ("fp8", _change("weight_scale_inv"), "without their scales"),
    ("fp8", _change("weight"), "itself is missing beside weight_scale_inv"),
    ("fp8", _change("weight", lambda w: w.float()), "8_e5m2, not .*float32"),
    ("fp8", _change("weight", lambda w: w.view(torch.int8)), "8_e5m2, not .*int8"),
    (
        "fp8",
        _change("weight_scale_inv", lambda s: s[:-1]),
        r"in blocks of \[32, 32\] need \[4, 8\]",
    ),
    ("fp8", _change("weight_scale_inv", lambda s: s.T), "scales, not"),
    ("fp8", _change("weight_scale_inv", lambda s: s[0, 0]), "scales, not"),
    ("fp8", _change("weight_scale_inv", lambda s: s.long()), "floating point or uint8"),
    (
        "fp8",
        _change("weight", lambda w: w.view(torch.uint8).flatten().view(FLOAT8)),
        "are matrices",
    ),
    ("fp8", _both, "several scales of one weight"),
    ("fp8-tensor", _change("weight_scale_inv", lambda s: torch.ones(3)), "need .*not"),
    ("fp8-rows", _change("weight_scale", lambda s: s[:-1]), "scales, not"),
    ("modelopt", _change("weight_scale"), "without their scales"),
    ("ct-rows", _change("weight_scale"), "without their scales"),
    ("ct-int", _change("weight", lambda w: w.view(torch.uint8)), "is torch.int8, not .*uint8"),
    ("ct-int-groups", _change("weight_zero_point"), "without its zero points"),
    ("ct-int-groups", _change("weight_zero_point", lambda z: z[:-1]), "zero points, not"),
    ("ct-int-groups", _change("weight_zero_point", lambda z: z.float()), "zero points are int8"),
    ("ct-int-groups", _change("weight_scale", lambda s: s[:, :1]), "scales, not"),
    ("mxfp4", _of_experts("blocks"), "are blocks and scales, not"),
    ("mxfp4", _of_experts("scales"), "are blocks and scales, not"),
    ("mxfp4", _of_experts("scales", lambda s: s.float()), "are uint8"),
    ("mxfp4", _of_experts("scales", lambda s: s[..., :-1]), "need scales"),
    ("mxfp4", _of_experts("blocks", lambda b: b.flatten(2)), "need scales"),
]


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize(("name", "edit", "message"), PIECES)
def test_pieces(name: str, edit: Any, message: str, dequantize: bool, make: Make) -> None:
    layer = EXPERTS if name == "mxfp4" else LAYER
    with pytest.raises(QuantizationError, match=rf"^{layer}: .*{message}"):
        lean_model(make(name, edit), dequantize=dequantize)


def test_a_weight_of_another_shape(make: Make) -> None:
    def edit(tensors: Tensors) -> None:
        _change("weight", lambda w: w[:-32])(tensors)
        _change("weight_scale_inv", lambda s: s[:-1])(tensors)

    with pytest.raises(MissingWeightsError, match=r"down_proj\.weight is"):
        lean_model(make("fp8", edit))


def test_codes_under_a_name_of_their_own(make: Make) -> None:
    """8-bit floats that no scales belong to are never taken for numbers."""
    with pytest.raises(QuantizationError, match=r"lm_head.scaled .*none of the scales"):
        lean_model(make("fp8", lambda t: t.update({"lm_head.scaled": torch.ones(4).to(FLOAT8)})))


def _set(**values: Any) -> Any:
    return lambda fields: fields.update(values)


def _group(**values: Any) -> Any:
    return lambda fields: fields["config_groups"]["group_0"]["weights"].update(values)


def _second_group(**values: Any) -> Any:
    def edit(fields: Any) -> None:
        other = copy.deepcopy(fields["config_groups"]["group_0"])
        other["weights"].update(values)
        fields["config_groups"]["group_1"] = other

    return edit


ARG, ARCH, QUANT = ArgumentError, UnsupportedArchitectureError, QuantizationError
DECLARED = [
    ("fp8", lambda f: f.clear(), QUANT, 'no quantization_config.*"quant_method": "fp8"'),
    ("modelopt", lambda f: f.clear(), QUANT, "no quantization_config.*hf_quant_config"),
    ("ct-int", lambda f: f.clear(), QUANT, "no quantization_config"),
    ("mxfp4", lambda f: f.clear(), QUANT, 'no quantization_config.*"quant_method": "mxfp4"'),
    ("fp8", _set(weight_block_size=[64, 64]), QUANT, r"blocks of \[64, 64\] need"),
    ("fp8", _set(weight_block_size=None), QUANT, "need .* scales, not"),
    ("fp8", _set(weight_block_size=[0, 128]), ARG, "not a pair of positive numbers"),
    ("fp8", _set(weight_block_size=128), ARG, "not a pair of positive numbers"),
    ("fp8", _set(activation_scheme="none"), ARG, "neither 'dynamic' nor 'static'"),
    ("fp8", _set(scale_fmt="e5m3"), ARCH, "scale_fmt='e5m3'"),
    ("fp8", _set(fmt="e3m4"), ARCH, "fmt='e3m4'"),
    ("fp8", _set(expert_dtype="fp4"), ARCH, "expert_dtype='fp4'"),
    ("fp8", _set(quant_method="mxfp4"), QUANT, "declares mxfp4 weights, but .* none"),
    ("mxfp4", _set(quant_method="fp8"), QUANT, "declares fp8 weights, but .* none"),
    ("modelopt", _set(quant_algo="NVFP4"), ARCH, "NVFP4 weights cannot be read.*unquantized"),
    ("modelopt", _set(quant_algo=None), ARCH, "None weights cannot be read"),
    ("ct-rows", _set(format="nvfp4-pack-quantized"), ARCH, "'nvfp4-pack-quantized' cannot be read"),
    ("ct-rows", _set(format="mixed-precision"), ARCH, "'mixed-precision' cannot be read"),
    ("ct-rows", _set(format="int-quantized"), ARG, "contradict each other"),
    ("ct-int", _set(format="float-quantized"), ARG, "contradict each other"),
    ("ct-rows", _set(config_groups={}), ARG, "describes no config_groups"),
    ("ct-rows", _set(sparsity_config={"format": "sparse-24-bitmask"}), ARCH, "sparse-24-bitmask"),
    ("ct-rows", _group(num_bits=4), ARCH, "of 4 bits"),
    ("ct-rows", _group(strategy="token"), ARCH, "strategy 'token'"),
    ("ct-rows", _second_group(type="int"), ARCH, "in several ways .*fp8.*int8"),
    ("ct-rows", _second_group(strategy="group", group_size=32), ARCH, "in several ways"),
    ("ct-rows", _group(type="int"), ARG, "contradict each other"),
    ("ct-blocks", _group(block_structure=None), ARG, "without a block_structure"),
    ("ct-blocks", _group(block_structure=[16, 16]), QUANT, "need"),
    ("ct-int-groups", _group(group_size=64), QUANT, "need"),
]


@pytest.mark.parametrize(("name", "declare", "kind", "message"), DECLARED)
def test_configurations(
    name: str, declare: Any, kind: type[LeanLoadError], message: str, make: Make
) -> None:
    with pytest.raises(kind, match=message):
        lean_model(make(name, declare=declare))


@pytest.mark.parametrize("name", ["fp8", "ct-int", "mxfp4"])
def test_arguments(name: str, make: Make) -> None:
    source = make(name)
    with pytest.raises(ArgumentError, match="quantized already"):
        lean_model(source, quantize="nf4")
    with pytest.raises(ArgumentError, match="mixes the values"):
        lean_model(source, refactor_factored_attn_matrices=True)
    with pytest.raises(ArgumentError, match="copying load"):
        lean_model(source, strategy="copy")
