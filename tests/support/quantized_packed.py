"""Checkpoints in formats that are only read here, packed by each format's definition.

A packing turns a matrix into stored pieces, and says which values they stand for; the values are
those of the definition in float32, computed another way than the package does.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support import quantized_int4 as int4

Tensors = dict[str, torch.Tensor]
Pack = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]

_KEPT = ("embed", "wte", "wpe", "lm_head", "router", "gate.weight", "norm", "ln_")
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Values of 4-bit floats with two exponent bits and one mantissa bit, by code (OCP MX)."""


@dataclass(frozen=True)
class Packing:
    """A format and a way to use it.

    Attributes:
        declared: the `quantization_config`.
        pack: of a matrix [out, in]: pieces by the end of their name ("weight", "weight_scale"), and
            the float32 values.
        beside: pieces of a layer that no weight needs.
        stacked: only stacked experts are packed, whose pieces' names go on from the parameter's.
        weights_only: the runtime that it was made for rounds no activations.
    """

    declared: Mapping[str, Any]
    pack: Pack
    beside: Mapping[str, torch.Tensor] = field(default_factory=dict)
    stacked: bool = False
    weights_only: bool = False


def expanded(grid: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    """A number for each block as one for each element."""
    rows = torch.arange(shape[0]) // block[0]
    columns = torch.arange(shape[1]) // block[1]
    return grid[rows][:, columns]


def _largest(matrix: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The largest magnitude of each block."""
    parts = [part.split(block[1], 1) for part in matrix.abs().split(block[0])]
    return torch.stack([torch.stack([block.max() for block in row]) for row in parts])


def codes(
    dtype: torch.dtype,
    block: tuple[int, int] | None,
    name: str,
    *,
    scale_dtype: torch.dtype = torch.float32,
    powers: bool = False,
    zero_points: bool = False,
    shape: tuple[int, ...] | None = None,
    main: str = "weight",
) -> Pack:
    """How matrices become 8-bit codes with scales.

    Args:
        dtype: of the codes.
        block: (rows, columns), 0 for the whole side; None for one scale.
        name: of the scales.
        scale_dtype: of the scales.
        powers: store exponents, uint8.
        zero_points: whether codes are shifted.
        shape: of the stored scales, if not the grid's.
        main: name of the codes.
    """
    top = 127.0 if dtype == torch.int8 else float(torch.finfo(dtype).max)

    def pack(matrix: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        sides = tuple(matrix.shape) if block is None else block
        real = (sides[0] or matrix.shape[0], sides[1] or matrix.shape[1])
        scales = (_largest(matrix, real) / top * 1.01).to(scale_dtype)
        stored = scales
        if powers:
            exponents = scales.log2().ceil()
            stored, scales = (exponents + 127).to(torch.uint8), torch.exp2(exponents)
        spread = expanded(scales.float(), tuple(matrix.shape), real)
        pieces: Tensors = {}
        shift = torch.zeros_like(spread)
        if zero_points:
            zeros = torch.arange(scales.numel()).reshape(scales.shape) % 7 - 3
            pieces[name.replace("scale", "zero_point")] = zeros.to(torch.int8)
            shift = expanded(zeros.float(), tuple(matrix.shape), real)
        shifted = matrix / spread + shift
        made = shifted.round().clamp(-128, 127) if dtype == torch.int8 else shifted
        made = made.to(dtype)
        pieces[main] = made
        pieces[name] = stored if shape is None else stored.reshape(shape)
        return pieces, (made.float() - shift) * spread

    return pack


def _mxfp4(matrix: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    rows, columns = matrix.shape
    groups = matrix.view(rows, columns // 32, 32)
    exponents = (groups.abs().amax(-1) / 6).clamp_min(1e-20).log2().ceil()
    scaled = groups / torch.exp2(exponents)[..., None]
    nearest = (scaled[..., None] - FP4).abs().argmin(-1).to(torch.uint8)
    pieces = {
        "blocks": nearest[..., ::2] | nearest[..., 1::2] << 4,
        "scales": (exponents + 127).to(torch.uint8),
    }
    values = FP4[nearest.long()] * torch.exp2(exponents)[..., None]
    return pieces, values.reshape(rows, columns)


def _gguf(matrix: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Blocks of Q4_1: a scale, a minimum, and 32 codes, the first half of them in the low bits."""
    groups = matrix.reshape(len(matrix), -1, 32)
    least = groups.amin(-1, keepdim=True).half()
    scale = ((groups.amax(-1, keepdim=True) - least.float()) / 15).half()
    codes = ((groups - least.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8)
    parts = [
        scale.view(torch.uint8),
        least.view(torch.uint8),
        codes[..., :16] | codes[..., 16:] << 4,
    ]
    values = codes.float() * scale.float() + least.float()
    return {"Q4_1": torch.cat(parts, -1).flatten(1)}, values.reshape(matrix.shape)


def _compressed(named: str, strategy: str, **weights: Any) -> dict[str, Any]:
    inputs = {"num_bits": 8, "type": named, "strategy": "token", "dynamic": True}
    weights = {"num_bits": 8, "type": named, "strategy": strategy, "symmetric": True, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{named}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _torchao(kind: str, **settings: Any) -> dict[str, Any]:
    described = {"_type": kind, "_version": 2, "_data": settings}
    return {"quant_method": "torchao", "quant_type": {"default": described}}


_INT8 = torch.int8
# torch 2.0 has no such dtypes; another stands in, and nothing is packed there.
_E4M3: Any = getattr(torch, "float8_e4m3fn", torch.float16)
_E5M2: Any = getattr(torch, "float8_e5m2", torch.float16)
_STATIC = {"activation_scale": torch.tensor(0.5)}
PACKINGS: dict[str, Packing] = {
    "fp8": Packing(
        {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
        codes(_E4M3, (32, 32), "weight_scale_inv"),
    ),
    "fp8-ends": Packing(  # blocks that are cut short at both ends
        {"quant_method": "fp8", "weight_block_size": [48, 40], "fmt": "e4m3"},
        codes(_E4M3, (48, 40), "weight_scale_inv", scale_dtype=torch.bfloat16),
    ),
    "fp8-powers": Packing(
        {"quant_method": "fp8", "weight_block_size": [32, 64], "scale_fmt": "ue8m0"},
        codes(_E4M3, (32, 64), "weight_scale_inv", powers=True),
    ),
    "fp8-tensor": Packing(
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
        codes(_E5M2, None, "weight_scale_inv", shape=()),
        _STATIC,
    ),
    "fp8-rows": Packing(
        {"quant_method": "fbgemm_fp8"},
        codes(_E4M3, (1, 0), "weight_scale"),
        {"input_scale_ub": torch.tensor([1200.0])},
    ),
    "modelopt": Packing(
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        codes(_E4M3, None, "weight_scale", shape=()),
        {"input_scale": torch.tensor(0.5), "k_scale": torch.tensor(1.0)},
    ),
    "ct-rows": Packing(
        _compressed("float", "channel"),
        codes(_E4M3, (1, 0), "weight_scale", scale_dtype=torch.bfloat16),
    ),
    "ct-tensor": Packing(
        _compressed("float", "tensor"),
        codes(_E4M3, None, "weight_scale", shape=(1,)),
        {"input_scale": torch.tensor([0.5])},
    ),
    "ct-blocks": Packing(
        _compressed("float", "block", block_structure=[32, 32]),
        codes(_E4M3, (32, 32), "weight_scale"),
    ),
    "ct-int": Packing(_compressed("int", "channel"), codes(_INT8, (1, 0), "weight_scale")),
    "ct-int-groups": Packing(
        _compressed("int", "group", group_size=32, symmetric=False),
        codes(_INT8, (1, 32), "weight_scale", zero_points=True),
    ),
    "mxfp4": Packing({"quant_method": "mxfp4"}, _mxfp4, stacked=True, weights_only=True),
    "gptq": Packing(int4.gptq_config(4, 32), int4.gptq(4, 32), weights_only=True),
    "gptq-reordered": Packing(
        int4.gptq_config(4, 32, desc_act=True, sym=False, checkpoint_format="gptq_v2"),
        int4.gptq(4, 32, version=2, symmetric=False, reordered=True),
        weights_only=True,
    ),
    "gptq-8bit": Packing(
        int4.gptq_config(8, -1, sym=False, checkpoint_format="gptq"),
        int4.gptq(8, -1, symmetric=False),
        weights_only=True,
    ),
    "packed": Packing(
        int4.compressed_config(4, 32),
        int4.compressed(4, 32),
        weights_only=True,
    ),
    "packed-zeros": Packing(
        int4.compressed_config(4, 32, symmetric=False, actorder="group"),
        int4.compressed(4, 32, symmetric=False, reordered=True, dtype=torch.float32),
        weights_only=True,
    ),
    "packed-8bit": Packing(
        int4.compressed_config(8, -1),
        int4.compressed(8, -1),
        weights_only=True,
    ),
    "awq": Packing(int4.awq_config(64), int4.awq(64), weights_only=True),
    "torchao": Packing(
        _torchao("Int8WeightOnlyConfig"),
        codes(_INT8, (1, 0), "_weight_scale", main="_weight_qdata"),
        weights_only=True,
    ),
    "torchao-fp8": Packing(
        _torchao("Float8DynamicActivationFloat8WeightConfig"),
        codes(_E4M3, (1, 0), "_weight_scale", main="_weight_qdata"),
    ),
    "torchao-groups": Packing(
        _torchao("IntxWeightOnlyConfig", mapping_type={"_data": "ASYMMETRIC"}),
        codes(
            *(_INT8, (1, 32), "_weight_scale"),
            scale_dtype=torch.bfloat16,
            zero_points=True,
            main="_weight_qdata",
        ),
        weights_only=True,
    ),
}
if importlib.util.find_spec("gguf"):  # which only the usual environment has
    PACKINGS["gguf"] = Packing({"quant_method": "gguf"}, _gguf, weights_only=True)

ONE_OF_EACH = (
    *("fp8-ends", "ct-rows", "ct-int-groups", "mxfp4", "gptq-reordered", "awq"),
    *("packed-zeros", "packed-8bit", "torchao-groups"),
    *(name for name in PACKINGS if name == "gguf"),
)
"""A packing for each kind of weights."""


def kind_of(name: str) -> str:
    """The kind that the package gives the weights of a packing."""
    if name.startswith("packed"):
        return f"compressed-tensors-packed{8 if '8bit' in name else 4}"
    if name.startswith("ct-"):
        return f"compressed-tensors-{'int8' if 'int' in name else 'fp8'}"
    own = ("mxfp4", "gptq", "awq", "torchao", "gguf")
    return name.split("-")[0] if name.startswith(own) else "fp8"


def count(name: str, n_layers: int) -> int:
    """How many weights of a `HookedTransformer` are bytes: of a Llama, or gpt-oss' experts."""
    # GGUF quantizes embeddings and unembedding, too.
    return (9 if PACKINGS[name].stacked else 7) * n_layers + 2 * (name == "gguf")


def pack(tensors: Tensors, packing: Packing, is_gpt2: bool) -> tuple[Tensors, Tensors]:
    """The tensors of a checkpoint packed, and what they stand for.

    Quantized weights are [out, in] also of a Conv1D, which GPT-2 has.
    """
    packed, values = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if packing.stacked:
            if not name.endswith(("gate_up_proj", "down_proj")):
                continue
            made = [packing.pack(expert.T.contiguous()) for expert in tensor]
            values[name] = torch.stack([value.T for _, value in made]).contiguous()
            del packed[name]
            for piece in made[0][0]:
                packed[f"{name}_{piece}"] = torch.stack([pieces[piece] for pieces, _ in made])
        elif tensor.dim() == 2 and name.endswith(".weight") and not any(k in name for k in _KEPT):
            layer = name.removesuffix("weight")
            is_conv1d = is_gpt2 and ".c_" in name
            pieces, value = packing.pack((tensor.T if is_conv1d else tensor).contiguous())
            values[name] = value.T.contiguous() if is_conv1d else value
            del packed[name]
            packed |= {f"{layer}{piece}": part for piece, part in pieces.items()}
            packed |= {f"{layer}{piece}": part.clone() for piece, part in packing.beside.items()}
    return packed, values


@functools.cache
def folders(dense: Path, name: str) -> tuple[Path, Path]:
    """A checkpoint packed in one of `PACKINGS`, and an ordinary one of what it stands for."""
    if name == "gguf":
        return _gguf_folders(dense)
    packing = PACKINGS[name]
    fields = json.loads((dense / "config.json").read_text())
    is_gpt2 = fields["model_type"] == "gpt2"
    packed, values = pack(load_file(dense / "model.safetensors"), packing, is_gpt2)
    made = []
    for end, tensors in (("", packed), ("-dense", values)):
        target = dense.parent / f"{dense.name}-{name}{end}"
        shutil.copytree(dense, target)
        (target / "model.safetensors").unlink()
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        made.append(target)
    config = made[0] / "config.json"
    config.write_text(json.dumps({**fields, "quantization_config": dict(packing.declared)}))
    return made[0], made[1]


def _gguf_folders(dense: Path) -> tuple[Path, Path]:
    """A folder with one GGUF file, written by the gguf package, and what it stands for."""
    from tests.support import gguf_files

    made = dense.parent / f"{dense.name}-gguf", dense.parent / f"{dense.name}-gguf-dense"
    made[0].mkdir()
    types = ("Q8_0", "Q4_1", "Q5_0", "Q4_0", "Q5_1")  # whose blocks small matrices are made of
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    written = gguf_files.write_model(
        model, gguf_files.case_of(model), made[0] / "model.gguf", lambda n, _: types[n % 5]
    )
    written.model.save_pretrained(made[1])
    return made
