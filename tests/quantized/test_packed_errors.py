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
from tl_fastload.quantized.recipes import QuantizedSource
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
    monkeypatch.setattr(QuantizedSource, "matrix", refuse)


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


def _beside(tensors: Tensors) -> None:
    tensors[f"{LAYER}.weight"] = torch.ones(128, 256)


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
    ("gptq", _change("qweight"), "without qweight"),
    ("gptq", _change("qzeros"), "without qzeros"),
    ("gptq", _beside, "an ordinary weight .* beside qweight"),
    ("gptq", _change("scales"), "without scales"),
    ("gptq", _change("scales", lambda s: s[0]), "scales is a matrix"),
    ("gptq", _change("scales", lambda s: s[:-1]), r"groups of 32 needs \[128, 8\] .* as scales"),
    ("gptq", _change("scales", lambda s: s.int()), "as scales, not .*int32"),
    ("gptq", _change("qzeros", lambda z: z[:, :-1]), r"needs \[16, 8\] int32 as zero points"),
    ("gptq", _change("qzeros", lambda z: z.long()), "as zero points, not .*int64"),
    ("gptq", _change("qweight", lambda w: w[:-1]), r"needs \[128, 32\] int32 as packed codes"),
    ("gptq", _change("qweight", lambda w: w.long()), "as packed codes, not .*int64"),
    ("gptq", _change("g_idx", lambda g: g.float()), "a row of whole numbers, not .*float32"),
    ("gptq-reordered", _change("g_idx"), "without their g_idx"),
    ("awq", _change("qweight", lambda w: w[:, :-1]), "packs 120 outputs, and scales"),
    ("awq", _change("qzeros"), "without qzeros"),
    ("awq", _change("qzeros", lambda z: z[:-1]), "as zero points, not"),
    ("awq", _change("scales", lambda s: s[:-1]), "as scales, not"),
    ("packed", _change("weight_packed"), "without weight_packed"),
    ("packed", _beside, "an ordinary weight .* beside weight_packed"),
    ("packed", _change("weight_scale"), "without weight_scale"),
    ("packed", _change("weight_packed", lambda w: w.long()), "as packed codes, not .*int64"),
    ("packed-zeros", _change("weight_zero_point"), r"without its zero points \(weight_zero_point"),
    ("packed-zeros", _change("weight_zero_point", lambda z: z[:-1]), "as zero points, not"),
    ("packed-zeros", _change("weight_g_idx"), "without their weight_g_idx"),
    ("torchao", _change("_weight_qdata"), "itself is missing beside _weight_scale"),
    ("torchao", _change("_weight_scale"), "without their scales"),
    ("torchao", _change("_weight_qdata", lambda w: w.view(torch.uint8)), "is .*, not .*uint8"),
    ("torchao", _change("_weight_scale", lambda s: s[:, 0]), "codes and scales are matrices"),
    ("torchao", _change("_weight_scale", lambda s: s[:-1]), "scales, not"),
    ("torchao", _change("_weight_scale", lambda s: s.long()), "floating point or uint8"),
    ("torchao-groups", _change("_weight_zero_point", lambda z: z[:-1]), "zero points, not"),
    ("torchao-groups", _change("_weight_zero_point", lambda z: z.float()), "are int8, not"),
    ("torchao-groups", _change("_weight_zero_point"), "without its zero points"),
    (
        "torchao",
        lambda t: t.update({f"{LAYER}._weight_act_pre_scale": torch.ones(1, 256)}),
        "several scales of one weight",
    ),
]

VALUES = [
    ("gptq", _change("qzeros", lambda z: z | 0xF0), "zero points are stored as 15"),
    ("gptq-8bit", _change("qzeros", lambda z: z | 0xFF), "zero points are stored as 255"),
    ("gptq", _change("g_idx", lambda g: g.flip(0)), "one after the other, .*desc_act: false"),
    ("gptq", _change("g_idx", lambda g: g + 1), "groups 1 to 8 .* scales of 8 groups"),
    ("gptq-reordered", _change("g_idx", lambda g: g - 1), "groups -1 to 6 .* scales of 8"),
    ("packed", _change("weight_shape", lambda s: s + 1), r"weight_shape says \[129, 257\]"),
    ("packed-zeros", _change("weight_g_idx", lambda g: g * 2), "scales of 8 groups"),
    ("packed-zeros", _change("weight_g_idx", lambda g: g + 0), "one after .*actorder: null"),
    (
        "ct-int",
        lambda t: t.update({f"{LAYER}.weight_zero_point": torch.ones(128, 1, dtype=torch.int8)}),
        "zero points other than zero",
    ),
    (
        "packed",
        lambda t: t.update({f"{LAYER}.weight_zero_point": torch.ones(16, 8, dtype=torch.int32)}),
        "zero points other than zero",
    ),
    (
        "torchao",
        lambda t: t.update({f"{LAYER}._weight_zero_point": torch.ones(128, 1, dtype=torch.int8)}),
        "zero points other than zero",
    ),
]


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize(("name", "edit", "message"), VALUES)
def test_values(
    name: str, edit: Any, message: str, dequantize: bool, make: Make, monkeypatch: Any
) -> None:
    """What only the values of pieces say is seen when the weight's turn comes."""
    monkeypatch.undo()
    declare = _group(actorder=None) if "actorder" in message else None
    layer = LAYER if declare is None else r"model.layers.\d.*"
    with pytest.raises(QuantizationError, match=rf"{layer}: .*{message}"):
        lean_model(make(name, edit, declare), dequantize=dequantize)


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


def _torchao(*kinds: str) -> Any:
    table = {f"re:.*{number}": {"_type": kind, "_data": {}} for number, kind in enumerate(kinds)}
    return _set(quant_type={"default": {"_type": "FqnToConfig", "_data": {"fqn_to_config": table}}})


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
    ("gptq", lambda f: f.clear(), QUANT, 'no quantization_config.*"quant_method": "gptq"'),
    ("awq", lambda f: f.clear(), QUANT, "no quantization_config"),
    ("packed", lambda f: f.clear(), QUANT, 'no quantization_config.*"compressed-tensors"'),
    ("gptq", _set(bits=8), QUANT, "8-bit codes"),
    ("gptq", _set(bits=3), ARCH, "of 3 bits cannot be read, only 2 or 4 or 8"),
    ("gptq", _set(bits=None), ARG, "bits=None"),
    ("gptq", _set(bits="4"), ARG, "bits='4'"),
    ("gptq", _set(group_size=64), QUANT, "in groups of 64 needs .* as scales"),
    ("gptq", _set(group_size=-1), QUANT, "in groups of 256 needs .* as scales"),
    ("gptq", _set(group_size=0), ARG, "group_size=0"),
    ("gptq", _set(checkpoint_format="marlin"), ARCH, "'marlin'.* only gptq and gptq_v2"),
    ("gptq", _set(is_marlin_format=True), ARCH, "'marlin'"),
    ("gptq", _set(checkpoint_format="gptq_v3"), ARCH, "'gptq_v3'"),
    ("gptq", _set(pack_dtype="int64"), ARCH, "packed into int64"),
    ("gptq", _set(rotation="hadamard"), ARCH, "rotates activations"),
    ("gptq", _set(quant_method="awq"), QUANT, "packs .* outputs, and scales|Bits and group size"),
    ("awq", _set(quant_method="gptq"), QUANT, "Bits and group size are those"),
    ("awq", _set(version="gemv"), ARCH, "version 'gemv'.*only 'gemm'"),
    ("awq", _set(version="llm-awq"), ARCH, "version 'llm-awq'"),
    ("awq", _set(version="marlin"), ARCH, "version 'marlin'"),
    ("awq", _set(bits=8), ARCH, "of 8 bits cannot be read, only of 4"),
    ("awq", _set(zero_point=False), ARG, "zero_point: false"),
    ("awq", _set(group_size=32), QUANT, "groups of 32 needs .* as scales"),
    ("packed", _group(num_bits=8), QUANT, "needs .* as"),
    ("packed", _group(num_bits=3), ARCH, "of 3 bits .* integers of 4 or 8 bits"),
    ("packed", _group(type="float"), ARCH, "type 'float'"),
    ("packed", _group(strategy="tensor"), ARCH, "strategy 'tensor'"),
    ("packed", _group(strategy="block", block_structure=[16, 16]), ARCH, "in blocks cannot"),
    ("packed", _group(group_size=64), QUANT, "groups of 64 needs .* as scales"),
    ("packed", _group(symmetric=False), QUANT, r"without its zero points \(weight_zero_point"),
    ("packed", _set(format="int-quantized"), ARCH, "of 4 bits"),
    ("packed-8bit", _set(format="int-quantized"), QUANT, "with weight_packed"),
    ("ct-int", _set(format="pack-quantized"), QUANT, "without weight_packed"),
    ("packed-zeros", _second_group(symmetric=True), ARCH, "in several ways"),
    ("ct-rows", _set(config_groups=[1]), ARG, r"config_groups=\[1\] .* is no table"),
    ("ct-rows", _set(sparsity_config="dense"), ARG, "sparsity_config='dense' .* is no table"),
    ("packed", _group(num_bits=[4]), ARCH, r"of \[4\] bits"),
    ("gptq", _set(meta=7), ARG, "meta=7 .* is no table"),
    ("modelopt", _set(quantization=7), ARG, "quantization=7 .* is no table"),
    *(
        (name, _set(**{field: value}), ARG, f"{field}=.* is no list of modules")
        for name, field in [
            *((name, "modules_to_not_convert") for name in ("fp8", "mxfp4", "gptq", "awq")),
            *[("torchao", "modules_to_not_convert"), ("fp8-rows", "modules_to_not_convert")],
            *[("ct-int", "ignore"), ("modelopt", "ignore")],
        ]
        for value in (7, "lm_head", [7])
    ),
    ("torchao", lambda f: f.clear(), QUANT, 'no quantization_config.*"quant_method": "torchao"'),
    ("torchao", _set(quant_type="int8_weight_only"), ARG, "'int8_weight_only', which names no"),
    ("torchao", _set(quant_type={"default": {}}), ARG, "names no configuration"),
    ("torchao", _torchao("Int4WeightOnlyConfig"), ARCH, "of Int4WeightOnlyConfig cannot be read"),
    ("torchao", _torchao("MXFPInferenceConfig", "Int8WeightOnlyConfig"), ARCH, "MXFPInf.* cannot"),
    ("torchao", _set(quant_method="fp8"), QUANT, "declares fp8 weights, but .* none"),
]


@pytest.mark.parametrize(("name", "declare", "kind", "message"), DECLARED)
def test_configurations(
    name: str, declare: Any, kind: type[LeanLoadError], message: str, make: Make
) -> None:
    with pytest.raises(kind, match=message):
        lean_model(make(name, declare=declare))


@pytest.mark.parametrize("name", ["fp8", "ct-int", "mxfp4", "gptq", "awq", "packed", "torchao"])
def test_arguments(name: str, make: Make) -> None:
    source = make(name)
    with pytest.raises(ArgumentError, match="quantized already"):
        lean_model(source, quantize="nf4")
    with pytest.raises(ArgumentError, match="mixes the values"):
        lean_model(source, refactor_factored_attn_matrices=True)
    with pytest.raises(ArgumentError, match="copying load"):
        lean_model(source, strategy="copy")
