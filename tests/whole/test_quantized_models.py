"""Which bytes a quantized model holds: bitsandbytes' own, shared, and what is dense is listed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import quantized_zoo as qz
from tests.support import reference
from tests.support.comparison import lean_model
from tl_fastload.errors import ArgumentError

KINDS = ["int8", "nf4", "nf4-double", "fp4"]
NOT = "not quantized in the checkpoint"
UNPROCESSED = reference.NO_PROCESSING
every_kind = pytest.mark.parametrize("kind", KINDS)


def _layer_tensors(layer: Any) -> list[torch.Tensor]:
    """Everything that a layer of bitsandbytes needs to multiply, apart from its bias."""
    weight = layer.weight
    if hasattr(weight, "SCB"):
        return [weight.data, weight.SCB if weight.SCB is not None else layer.state.SCB]
    state = weight.quant_state
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [weight.data, state.absmax, state.code, *nested]


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _added_bytes(model: Any, hf: Any) -> int:
    """What TransformerLens has that transformers has not: biases that are zero, an unembedding
    of its own where it is tied; and scales that the footprint of transformers leaves out.
    """
    named = model.named_parameters()
    zeros = [p for name, p in named if ".b_" in name and not p.any()]
    is_tied = hf.config.tie_word_embeddings
    counted = {id(p) for p in (*hf.parameters(), *hf.buffers())}
    scales = [
        tensor
        for _, layer in qz.layers(hf)
        for tensor in _layer_tensors(layer)[1:]
        if id(tensor) not in counted
    ]
    return _bytes(zeros) + _bytes(scales) + _bytes([model.unembed.W_U] if is_tied else [])


@every_kind
@pytest.mark.parametrize(
    "case_id", ["gpt2", "llama-gqa", "llama-gqa1-tied", "qwen2", "phi", "mixtral", "opt"]
)
def test_size_is_that_of_transformers(case_id: str, kind: str, zoo: Any) -> None:
    folder = qz.build(zoo, case_id)
    hf = qz.hf_model(folder, kind)
    model = lean_model(folder, hf_model=hf, **UNPROCESSED)
    buffers = _bytes(hf.buffers())  # rotary tables, which TransformerLens makes itself
    expected = hf.get_memory_footprint() - buffers + _added_bytes(model, hf)
    assert abs(model.load_report.parameter_bytes - expected) < 0.01 * expected


@every_kind
@pytest.mark.parametrize("case_id", ["llama-gqa", "gpt2", "opt", "gemma2"])
def test_bytes_are_shared_with_hf_model(case_id: str, kind: str, zoo: Any) -> None:
    """Processed or not: processing is kept beside the bytes."""
    folder = qz.build(zoo, case_id)
    hf = qz.hf_model(folder, kind)
    theirs = {
        tensor.untyped_storage().data_ptr()
        for _, layer in qz.layers(hf)
        for tensor in _layer_tensors(layer)[:1]
    }
    for flags in (UNPROCESSED, {}):
        model = lean_model(folder, hf_model=hf, **flags)
        found = set()
        for name, weight in qz.quantized_parameters(model).items():
            stored = weight.content.stored
            held = stored.codes if kind == "int8" else stored.packed
            assert held.untyped_storage().data_ptr() in theirs, name
            found.add(held.untyped_storage().data_ptr())
        assert found == theirs
        assert not model.load_report.parameter_bytes > 1.2 * hf.get_memory_footprint() + 2e5


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-double"])
@pytest.mark.parametrize("case_id", ["neox", "bloom"])
def test_interleaved_heads_are_the_same_bytes(case_id: str, kind: str, zoo: Any) -> None:
    """Rows of fused projections by head are gathered: copied, but never made anew."""
    folder = qz.build(zoo, case_id)
    hf = qz.hf_model(folder, kind)
    name = next(n for n, _ in qz.layers(hf) if "query_key_value" in n)
    model = lean_model(folder, hf_model=hf, **UNPROCESSED)
    fused = qz.dequantized(hf.get_submodule(name))
    by_head = fused.view(model.cfg.n_heads, 3, model.cfg.d_head, model.cfg.d_model)
    for which, leaf in enumerate(("W_Q", "W_K", "W_V")):
        weight = getattr(model.blocks[0].attn, leaf)
        assert torch.equal(weight.dequantize(), by_head[:, which].transpose(1, 2))
        if kind != "nf4-double":  # whose scales may have to be written out
            n_bytes = _bytes(_layer_tensors(hf.get_submodule(name))[:2])
            assert weight.nbytes_stored() - 4 * 16 <= n_bytes / 3


def test_caller_model_stays_as_it_was(zoo: Any) -> None:
    folder = qz.build(zoo, "gpt2")
    hf = qz.hf_model(folder, "int8")
    before = {name: value.clone() for name, value in hf.state_dict().items() if value is not None}
    model = lean_model(folder, hf_model=hf)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    after = hf.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in hf.parameters())
    dense = {p.data_ptr() for p in hf.parameters() if p.is_floating_point()}
    ours = {
        p.data_ptr()
        for name, p in model.named_parameters()
        if name not in qz.quantized_parameters(model)
    }
    assert not dense & ours


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_layers_that_the_configuration_does_not_declare(kind: str, zoo: Any) -> None:
    """Put there by hand: quantized all the same, not dequantized unsaid."""
    folder = qz.build(zoo, "llama-gqa")
    hf = copy.deepcopy(qz.hf_model(folder, kind))
    del hf.config.quantization_config
    model = lean_model(folder, hf_model=hf)
    assert len(qz.quantized_parameters(model)) == 7 * model.cfg.n_layers
    assert model.load_report.quantization == f"{kind}, as in the checkpoint"
    with pytest.raises(ArgumentError, match=rf"quantized already \({kind}\)"):
        lean_model(folder, hf_model=hf, quantize="fp4")


EXPERTS = [
    f"blocks.{layer}.mlp.experts.{expert}.{leaf}.weight"
    for layer in range(2)
    for expert in range(3)
    for leaf in ("W_in", "W_gate", "W_out")
]
EMBEDDINGS = {"embed.W_E": f"embedding: {NOT}", "unembed.W_U": f"unembedding: {NOT}"}
ROUTERS = {f"blocks.{layer}.mlp.W_gate.weight": f"router: {NOT}" for layer in range(2)}
DENSE = {
    "llama-gqa": EMBEDDINGS,
    "gpt2": {**EMBEDDINGS, "pos_embed.W_pos": f"position embedding: {NOT}"},
    "mixtral": {**EMBEDDINGS, **ROUTERS, **dict.fromkeys(EXPERTS, NOT)},
}


@pytest.mark.parametrize("road", ["hf_model", "saved"])
@pytest.mark.parametrize("processing", [{}, UNPROCESSED], ids=["processed", "unprocessed"])
@pytest.mark.parametrize("kind", ["int8", "nf4-double"])
@pytest.mark.parametrize("case_id", DENSE)
def test_report_says_what_is_dense(
    case_id: str, kind: str, processing: Any, road: str, zoo: Any
) -> None:
    folder = qz.build(zoo, case_id)
    if road == "saved":
        model = lean_model(qz.saved(folder, kind), **processing)
    else:
        model = lean_model(folder, hf_model=qz.hf_model(folder, kind), **processing)
    report = model.load_report
    assert report.not_quantized == DENSE[case_id]
    assert report.quantization == f"{kind.removesuffix('-double')}, as in the checkpoint"
    named = model.named_parameters()
    matrices = {name for name, p in named if p.dim() > 1 and ".b_" not in name.replace("._", ".")}
    assert matrices - set(report.not_quantized) == set(qz.quantized_parameters(model))
    assert f"embed.W_E (embedding: {NOT})" in str(report)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_modules_that_the_configuration_skips(kind: str, zoo: Any) -> None:
    folder = qz.build(zoo, "llama-gqa")
    hf = qz.hf_model(folder, kind, skip="down_proj lm_head")
    assert not any("down_proj" in name for name, _ in qz.layers(hf))
    model = lean_model(folder, hf_model=hf)
    assert model.load_report.not_quantized == {
        **EMBEDDINGS,
        **{f"blocks.{layer}.mlp.W_out": NOT for layer in range(model.cfg.n_layers)},
    }
    expected = qz.hf_log_probs(folder, kind, "llama-gqa", skip="down_proj lm_head")
    assert qz.gap(qz.log_probs(model, "llama-gqa"), expected) < 1e-4


def test_rows_that_share_blocks_are_dense_and_told(zoo: Any) -> None:
    """The 9 rows of 36 of a head, in blocks of 64, cannot be taken out of a fused matrix."""
    folder = zoo("bloom")
    model = lean_model(folder, hf_model=qz.hf_model(folder, "nf4"), **UNPROCESSED)
    reasons = {
        name: reason
        for name, reason in model.load_report.not_quantized.items()
        if name.startswith("blocks.0")
    }
    assert set(reasons) == {f"blocks.0.attn.W_{letter}" for letter in "QKV"}
    assert all("not a whole number of blocks of 64" in reason for reason in reasons.values())
    assert qz.quantized_parameters(model).keys() >= {"blocks.0.attn.W_O", "blocks.0.mlp.W_in"}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_saved_bytes_are_mapped(kind: str, zoo: Any) -> None:
    """Two loads of one file hold the same pages: nothing is written to either."""
    folder = qz.saved(qz.build(zoo, "llama-gqa"), kind)
    model = lean_model(folder, mmap=True)
    size = (folder / "model.safetensors").stat().st_size
    weights = qz.quantized_parameters(model)
    held = sum(w.content.stored.nbytes() for w in weights.values())
    assert held > size // 3
    file = str(folder / "model.safetensors")
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[0] for line in maps if line.endswith(file)]
    ranges = [tuple(int(edge, 16) for edge in span.split("-")) for span in mapped]
    for name, weight in weights.items():
        stored = weight.content.stored
        address = (stored.codes if kind == "int8" else stored.packed).data_ptr()
        assert any(low <= address < high for low, high in ranges), name
