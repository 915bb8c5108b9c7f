"""GPTQ, AWQ and packed weights of compressed-tensors: what only they have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tl_fastload
from tests.support import quantized_int4 as int4
from tests.support import quantized_packed as packed
from tests.support import quantized_zoo as qz
from tests.support import reference
from tests.support.comparison import lean_model
from tests.support.quantized_kinds import dense_matrix
from tl_fastload.errors import MissingWeightsError, QuantizationError
from tl_fastload.quantized import formats
from tl_fastload.quantized.formats.packed_bytes import AwqBytes, PackedBytes

Tensors = dict[str, torch.Tensor]


def _bytes(declared: dict[str, Any], pieces: Tensors) -> Any:
    spec = next(s for f in formats.FORMATS if (s := f.declared(declared)) is not None)
    return formats.of_kind(spec.kind).assemble(pieces, spec)


WAYS: dict[str, tuple[dict[str, Any], int4.Pack]] = {
    "gptq-2bit": (int4.gptq_config(2, 16), int4.gptq(2, 16)),
    "gptq-4bit": (
        int4.gptq_config(4, 40, checkpoint_format="gptq_v2"),  # the last group is smaller
        int4.gptq(4, 40, version=2, symmetric=False),
    ),
    "gptq-8bit": (
        int4.gptq_config(8, 64, desc_act=True),
        int4.gptq(8, 64, symmetric=False, reordered=True, dtype=torch.bfloat16),
    ),
    "gptq-one-group": (
        int4.gptq_config(4, -1, desc_act=True),
        int4.gptq(4, -1, symmetric=False, reordered=True),
    ),
    "awq": (int4.awq_config(32), int4.awq(32)),
    "awq-one-group": (int4.awq_config(-1), int4.awq(-1)),
    "packed": (
        int4.compressed_config(4, 32, symmetric=False),
        int4.compressed(4, 32, symmetric=False),
    ),
    "packed-8bit": (
        int4.compressed_config(8, -1, symmetric=False),
        int4.compressed(8, -1, symmetric=False, dtype=torch.float32),
    ),
}
ROWS, COLUMNS = 48, 160
# Runs of words, rows inside words, words out of order, rows twice, every third, none, the end.
INDICES = [
    range(16, 32),
    range(3, 21),
    [*range(8, 16), *range(0, 8)],
    [5, 5, 40, 1],
    range(1, 48, 3),
    [],
    range(40, 48),
    [*range(8, 24), *range(32, 35)],
    [*range(0, 3), *range(8, 16)],
]


@pytest.mark.parametrize("way", WAYS)
def test_values_and_rows_are_exact(way: str) -> None:
    """Bit for bit those of codes that are unpacked one by one."""
    declared, pack = WAYS[way]
    pieces, values = pack(dense_matrix(ROWS, COLUMNS))
    made = _bytes(declared, pieces)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(made.dense(dtype), values.to(dtype))
    assert {part.data_ptr() for part in made.tensors().values()} <= {
        part.data_ptr() for part in pieces.values()
    }
    outline = _bytes(declared, {name: part.to("meta") for name, part in pieces.items()})
    assert (outline.shape, outline.nbytes()) == ((ROWS, COLUMNS), made.nbytes())
    for numbers in INDICES:
        index = torch.tensor(list(numbers), dtype=torch.int64)
        part = made.rows(index)
        assert torch.equal(part.dense(torch.float32), values[index])
        assert part.nbytes() <= made.nbytes() * (len(index) + 8) / ROWS + 4 * COLUMNS
        again = part.rows(torch.arange(len(index) // 2))
        assert torch.equal(again.dense(torch.float32), values[index][: len(index) // 2])
        assert outline.rows(index).nbytes() == part.nbytes()
        x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(part.linear(x), x @ values[index].T)


def test_rows_that_begin_with_a_word_are_shared() -> None:
    for way in WAYS:
        declared, pack = WAYS[way]
        made = _bytes(declared, pack(dense_matrix(ROWS, COLUMNS))[0])
        part = made.rows(torch.arange(16, 32))
        for name, whole in made.tensors().items():
            held = part.tensors()[name]
            assert held.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr(), way


def test_all_codes_and_zero_points() -> None:
    """Also zero points of 0 and of the largest code, as the second version of GPTQ stores them."""
    codes = torch.arange(16).repeat(16, 2)
    zeros, scales = torch.arange(16)[:, None], torch.full((16, 1), 0.5, dtype=torch.float16)
    groups = torch.zeros(32, dtype=torch.int64)
    expected = int4.values_of(codes, zeros, scales, groups)
    stored = {
        "qweight": int4.words(codes, 4).T.contiguous(),
        "qzeros": int4.words(zeros.T, 4),
        "scales": scales.T.contiguous(),
    }
    made = _bytes(int4.gptq_config(4, -1, checkpoint_format="gptq_v2"), stored)
    assert torch.equal(made.dense(torch.float32), expected)
    with pytest.raises(QuantizationError, match=r"1 zero points are stored as 15, .*gptq_v2"):
        _bytes(int4.gptq_config(4, -1), stored)
    for_awq = {
        "qweight": int4.words(codes.T, 4, int4.AWQ_ORDER),
        "qzeros": int4.words(zeros.T, 4, int4.AWQ_ORDER),
        "scales": stored["scales"],
    }
    assert torch.equal(_bytes(int4.awq_config(-1), for_awq).dense(torch.float32), expected)


def test_a_last_word_that_is_not_full() -> None:
    """gptqmodel and compressed-tensors fill up rows whose length is no multiple of eight."""
    for declared, pack in (
        (int4.gptq_config(4, 20), int4.gptq(4, 20)),
        (int4.compressed_config(4, 20), int4.compressed(4, 20)),
    ):
        pieces, values = pack(dense_matrix(16, 100))
        made = _bytes(declared, pieces)
        assert torch.equal(made.dense(torch.float32), values)
        assert torch.equal(made.rows(torch.arange(3, 9)).dense(torch.float32), values[3:9])


def test_an_order_that_was_not_recorded() -> None:
    """Some versions of compressed-tensors store groups of -1 where nothing was reordered."""
    pieces, values = int4.compressed(4, 32)(dense_matrix(16, 128))
    pieces["weight_g_idx"] = torch.full((128,), -1, dtype=torch.int32)
    for order in ("group", None):
        made = _bytes(int4.compressed_config(4, 32, actorder=order), pieces)
        assert torch.equal(made.dense(torch.float32), values)


Make = Callable[..., Path]


@pytest.fixture
def make(zoo: Any, tmp_path: Path) -> Make:
    """`make(name, edit tensors, more of quantization_config, what to pack)` -> a folder."""

    def made(name: str, edit: Any = None, declare: Any = None, folder: Any = None) -> Path:
        target = tmp_path / name
        shutil.copytree(qz.saved(folder or qz.build(zoo, "llama-gqa"), name), target)
        tensors = load_file(target / "model.safetensors")
        if edit is not None:
            edit(tensors)
        (target / "model.safetensors").unlink()
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        fields = json.loads((target / "config.json").read_text())
        fields["quantization_config"].update(declare or {})
        (target / "config.json").write_text(json.dumps(fields))
        return target

    return made


def test_biases_that_are_zeros(make: Make, zoo: Any) -> None:
    """AutoGPTQ gave every layer a bias, also of models that have none."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".scales")]:
            bias = torch.zeros(tensors[name].shape[1], dtype=torch.float16)
            tensors[f"{name.removesuffix('scales')}bias"] = bias

    source = make("gptq", edit)
    expected = qz.load(qz.build(zoo, "llama-gqa"), "gptq")
    for arguments in ({}, {"dequantize": True}):
        model = lean_model(source, **arguments)
        notes = model.load_report.notes
        assert [n for n in notes if "21 biases of quantized weights" in n], notes
        gap = qz.gap(qz.log_probs(model, "llama-gqa"), qz.log_probs(expected, "llama-gqa"))
        assert gap < 1e-5
    assert tl_fastload.plan(source, device="cpu").parameter_bytes["quantized"] > 0


def test_biases_that_are_not_zeros(make: Make) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.up_proj.bias"] = torch.full((256,), 0.25)

    with pytest.raises(MissingWeightsError, match=r"unexpected: .*\.0\.mlp\.up_proj\.bias"):
        lean_model(make("gptq", edit))


def test_layers_with_other_bits_and_groups(make: Make, zoo: Any) -> None:
    """gptqmodel's rules for single layers (`dynamic`); each layer's shapes say what it has."""
    folder = qz.build(zoo, "llama-gqa")
    layer = "model.layers.1.mlp.down_proj"
    matrix = load_file(folder / "model.safetensors")[f"{layer}.weight"]
    pieces, values = int4.gptq(8, 64)(matrix)

    def edit(tensors: Tensors) -> None:
        tensors.update({f"{layer}.{name}": piece for name, piece in pieces.items()})

    rules = {"-:.*lm_head": {}, r"+:.*layers\.1\.mlp\.down_proj": {"bits": 8, "group_size": 64}}
    model = lean_model(make("gptq", edit, {"dynamic": rules}), **reference.NO_PROCESSING)
    found = model.blocks[1].mlp.W_out
    assert found.content.stored.bits == 8
    assert torch.equal(found.dequantize(), values.T)
    assert model.blocks[0].mlp.W_out.content.stored.bits == 4


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_an_unembedding_that_is_quantized(name: str, make: Make, zoo: Any) -> None:
    """`lm_head: true`: it stays bytes, and is folded and centred exactly."""
    folder = zoo("llama-gqa", **{**qz.wide("llama-gqa"), "vocab_size": 104})
    matrix = load_file(folder / "model.safetensors")["lm_head.weight"]
    pieces, values = packed.PACKINGS[name].pack(matrix)

    def edit(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]
        tensors.update({f"lm_head.{piece}": part for piece, part in pieces.items()})

    source = make(name, edit, {"lm_head": True}, folder)
    plain = source.parent / "plain"
    shutil.copytree(qz.dense_folder("llama-gqa", folder, name), plain)
    tensors = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    tensors["lm_head.weight"] = values
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    for flags in ({}, reference.NO_PROCESSING):
        model, expected = lean_model(source, **flags), lean_model(plain, **flags)
        assert "unembed.W_U" in qz.quantized_parameters(model)
        assert model.unembed.W_U.why_dense() is None
        gap = qz.gap(qz.log_probs(model, "llama-gqa"), qz.log_probs(expected, "llama-gqa"))
        assert gap < 1e-4
        assert qz.relative_gap(model.unembed.W_U.dequantize(), expected.unembed.W_U) < 1e-6


def test_layers_in_memory_are_refused(zoo: Any) -> None:
    """Kernels put the bytes into other orders."""
    hf = reference.hf_model("llama-gqa", qz.build(zoo, "llama-gqa"))
    layer = torch.nn.Module()
    layer.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    kept = hf.model.layers[0].mlp.up_proj
    hf.model.layers[0].mlp.up_proj = layer
    try:
        with pytest.raises(QuantizationError, match=r"mlp\.up_proj.*folder or name, not hf_model"):
            lean_model(qz.build(zoo, "llama-gqa"), hf_model=hf)
    finally:
        hf.model.layers[0].mlp.up_proj = kept


def test_classes_of_bytes_have_tags_of_their_own() -> None:
    assert formats.bytes_class("packed") is PackedBytes
    assert formats.bytes_class("awq") is AwqBytes
