"""Formats that are only read: bytes stay bytes, with the numbers of what they stand for."""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tl_fastload
from tests.support import quantized_packed as packed
from tests.support import quantized_zoo as qz
from tests.support import reference
from tests.support.comparison import lean_model
from tl_fastload import load_weights_
from tl_fastload.errors import ArgumentError, NumbersWarning, QuantizationError
from tl_fastload.quantized import formats

FLAGS: dict[bool, dict[str, bool]] = {True: {}, False: reference.NO_PROCESSING}
every_packing = pytest.mark.parametrize("name", packed.PACKINGS)


def case_of(name: str) -> str:
    return "gpt-oss" if packed.PACKINGS[name].stacked else "llama-gqa"


def load_told(name: str, source: Path, **arguments: Any) -> Any:
    """A model of a packing, which says once, in a warning and a note, what the runtime that the
    checkpoint was made for rounds besides.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = lean_model(source, **arguments)
    told = [w for w in caught if issubclass(w.category, NumbersWarning)]
    said = [str(w.message) for w in told]
    assert len(said) == (0 if packed.PACKINGS[name].weights_only else 1)
    assert all("runtime that rounds activations" in text for text in said)
    assert [note for note in model.load_report.notes if "runtime" in note] == said
    assert all(Path(w.filename).name == "comparison.py" for w in told)
    return model


@pytest.fixture(scope="module")
def ordinary(zoo: Any) -> Callable[[str, bool], Any]:
    """`ordinary(name, processed)`: the model of what a packing stands for, to be read only."""

    @functools.cache
    def load(name: str, processed: bool) -> Any:
        case_id = case_of(name)
        dense = qz.dense_folder(case_id, qz.build(zoo, case_id), name)
        return lean_model(dense, **FLAGS[processed])

    return load


@pytest.fixture(scope="module")
def packed_model(zoo: Any) -> Callable[[str], Any]:
    """`packed_model(name)`: the processed model of a packing, to be read only."""
    return functools.cache(
        lambda name: load_told(name, qz.saved(qz.build(zoo, case_of(name)), name))
    )


def _mapped(file: Path) -> list[range]:
    """The addresses at which a file is mapped here."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    edges = [line.split()[0].split("-") for line in lines if line.endswith(str(file))]
    return [range(int(low, 16), int(high, 16)) for low, high in edges]


@every_packing
def test_bytes_stay_bytes_with_the_numbers_of_their_values(
    name: str, zoo: Any, ordinary: Any, packed_model: Any
) -> None:
    case_id = case_of(name)
    folder = qz.build(zoo, case_id)
    source = qz.saved(folder, name)
    file = next(source.glob("model.*"))
    expected = qz.hf_log_probs(folder, name, case_id)
    for processed, flags in FLAGS.items():
        model = packed_model(name) if processed else load_told(name, source, **flags)
        plain = ordinary(name, processed)
        assert qz.gap(qz.log_probs(model, case_id), expected) < 1e-4
        assert model.load_report.quantization == f"{packed.kind_of(name)}, as in the checkpoint"
        held, mapped = qz.quantized_parameters(model), _mapped(file)
        assert len(held) == packed.count(name, model.cfg.n_layers)
        for key, weight in held.items():
            stored = weight.content.stored
            assert weight.why_dense() is None
            codes = next(iter(stored.tensors().values()))
            turned = name == "gguf" and key.endswith((".W_Q", "._W_K"))  # in llama.cpp's order
            assert any(codes.data_ptr() in part for part in mapped) is not turned
        if flags:
            for key, value in plain.named_parameters():
                found = model.get_parameter(key)
                found = found.dequantize() if key in held else found
                assert torch.equal(found, value), key
        assert qz.gap(qz.log_probs(plain, case_id), qz.log_probs(model, case_id)) < 1e-4


@pytest.mark.parametrize("processed", FLAGS, ids=["processed", "unprocessed"])
@pytest.mark.parametrize(
    ("name", "mmap"),
    [*((name, "auto") for name in packed.PACKINGS), ("fp8-ends", False), ("mxfp4", False)],
)
def test_dequantized_on_the_way(
    name: str,
    processed: bool,
    mmap: Any,
    zoo: Any,
    ordinary: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ordinary weights, bit for bit those of an ordinary checkpoint; transformers loads nothing."""
    expected = ordinary(name, processed)
    source = qz.saved(qz.build(zoo, case_of(name)), name)
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loads")
    )
    model = load_told(name, source, dequantize=True, mmap=mmap, **FLAGS[processed])
    assert not qz.quantized_parameters(model)
    assert (model.load_report.quantization, model.load_report.not_quantized) == (None, {})
    assert model.cfg.quantization_method is None
    for key, value in expected.named_parameters():
        found = model.get_parameter(key)
        assert torch.equal(found, value), key
        assert found.stride() == value.stride(), key
        assert found.untyped_storage().nbytes() == found.numel() * 4, key


@every_packing
def test_a_plan_knows_the_bytes(name: str, zoo: Any, packed_model: Any) -> None:
    source = qz.saved(qz.build(zoo, case_of(name)), name)
    model, plan = packed_model(name), tl_fastload.plan(source, device="cpu")
    held = qz.quantized_parameters(model).values()
    assert plan.quantization == f"{packed.kind_of(name)}, as in the checkpoint"
    assert plan.parameter_bytes["quantized"] == sum(w.nbytes_stored() for w in held)
    dense = tl_fastload.plan(source, device="cpu", dequantize=True)
    assert dense.quantization is None
    assert dense.parameter_bytes.get("quantized", 0) == 0


# Formats that take rows and pieces apart in other ways, each once in a usual run.
CASES = {
    "fp8": ("gpt2", "phi3-gqa", "bloom", "mixtral", "qwen3"),
    "gptq-reordered": ("gpt2", "neox"),
    "awq": ("phi3-gqa", "bloom"),
    "packed-zeros": ("mixtral",),
    "torchao-groups": ("gpt2",),
}


@pytest.mark.parity
@pytest.mark.parametrize(
    ("case_id", "name"),
    [
        pytest.param(case_id, name, marks=[] if case_id in usual else pytest.mark.slow)
        for name, usual in CASES.items()
        for case_id in qz.CASES
    ],
)
def test_every_architecture(case_id: str, name: str, zoo: Any) -> None:
    """Heads of fused projections and experts of their own included; what is dense is listed."""
    folder = qz.build(zoo, case_id)
    names = set(load_file(qz.saved(folder, name) / "model.safetensors"))
    codes = ("_scale_inv", ".qweight", ".weight_packed", "._weight_qdata")
    for flags in ({}, reference.NO_PROCESSING):
        model = qz.load(folder, name, **flags)
        gap = qz.gap(qz.log_probs(model, case_id), qz.hf_log_probs(folder, name, case_id))
        assert gap < 1e-4
        held = qz.quantized_parameters(model)
        assert len(held) >= len([stored for stored in names if stored.endswith(codes)])
        assert all(weight.why_dense() is None for weight in held.values())
        matrices = {key for key, p in model.named_parameters() if p.dim() > 1 and "W_" in key}
        dense = matrices - set(held)
        assert dense <= set(model.load_report.not_quantized), dense
        assert all("experts" not in key for key in dense)


def _stacked(folder: Path, target: Path, block: tuple[int, int] | None) -> tuple[Path, Path]:
    """A Mixtral whose experts are stacked as transformers 5 holds them, and its values."""
    shutil.copytree(folder, target / "fp8")
    shutil.copytree(folder, target / "dense")
    tensors = load_file(folder / "model.safetensors")
    experts: dict[str, dict[str, list[torch.Tensor]]] = {}
    for name in sorted(tensors):
        if ".experts." in name:
            head, _, rest = name.partition(".experts.")
            stacks = experts.setdefault(head, {"w1": [], "w2": [], "w3": []})
            stacks[rest.split(".")[1]].append(tensors.pop(name))
    values = dict(tensors)
    make = packed.codes(torch.float8_e4m3fn, block, "scale_inv")
    for head, stacks in experts.items():
        layer = f"{head.replace('block_sparse_moe', 'mlp')}.experts."
        fused = [torch.cat(pair) for pair in zip(stacks["w1"], stacks["w3"], strict=True)]
        for leaf, matrices in (("gate_up_proj", fused), ("down_proj", stacks["w2"])):
            made = [make(matrix) for matrix in matrices]
            tensors[layer + leaf] = torch.stack([pieces["weight"] for pieces, _ in made])
            scales = torch.stack([pieces["scale_inv"] for pieces, _ in made])
            tensors[f"{layer}{leaf}_scale_inv"] = scales
            values[layer + leaf] = torch.stack([value for _, value in made])
    for end, table in (("fp8", tensors), ("dense", values)):
        (target / end / "model.safetensors").unlink()
        save_file(table, target / end / "model.safetensors", metadata={"format": "pt"})
    config = target / "fp8" / "config.json"
    declared = {"quant_method": "fp8", "weight_block_size": block and list(block)}
    fields = {**json.loads(config.read_text()), "quantization_config": declared}
    config.write_text(json.dumps(fields))
    return target / "fp8", target / "dense"


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="stacks no experts")
@pytest.mark.parametrize("block", [(32, 32), (48, 64), None], ids=str)
def test_stacked_experts(block: tuple[int, int] | None, zoo: Any, tmp_path: Path) -> None:
    """Also with blocks that end with each matrix, and with one scale for each expert."""
    source, values = _stacked(qz.build(zoo, "mixtral"), tmp_path, block)
    for flags in ({}, reference.NO_PROCESSING):
        model, plain = lean_model(source, **flags), lean_model(values, **flags)
        held = qz.quantized_parameters(model)
        assert len(held) == model.cfg.n_layers * model.cfg.num_experts * 3
        assert qz.gap(qz.log_probs(model, "mixtral"), qz.log_probs(plain, "mixtral")) < 1e-4
    mapped = _mapped(source / "model.safetensors")
    for name, weight in held.items():
        assert torch.equal(weight.dequantize(), plain.get_parameter(name)), name
        assert any(weight.content.stored.codes.data_ptr() in part for part in mapped)


COPIED = [*packed.ONE_OF_EACH, "fp8-powers", "gptq-8bit"]


@pytest.mark.parametrize("name", COPIED)
def test_processed_copies_and_the_cache(
    name: str, zoo: Any, packed_model: Any, tmp_path: Path
) -> None:
    case_id = case_of(name)
    source = qz.saved(qz.build(zoo, case_id), name)
    model = packed_model(name)
    model.save_lean(tmp_path / "copy")
    rounds = not packed.PACKINGS[name].weights_only
    with pytest.warns(NumbersWarning, match="runtime") if rounds else nullcontext():
        again = lean_model(tmp_path / "copy")
    assert again.load_report.quantization == f"{packed.kind_of(name)}, as saved"
    assert again.load_report.mapped_bytes == again.load_report.parameter_bytes
    assert torch.equal(qz.log_probs(again, case_id), qz.log_probs(model, case_id))
    held, copied = qz.quantized_parameters(model), qz.quantized_parameters(again)
    assert held.keys() == copied.keys()
    size = sum(path.stat().st_size for path in (tmp_path / "copy").rglob("*.safetensors"))
    assert size < 1.1 * model.load_report.parameter_bytes
    first = lean_model(source, cache=tmp_path / "cache")
    second = lean_model(source, cache=tmp_path / "cache")
    assert second.load_report.mapped_bytes == second.load_report.parameter_bytes
    assert torch.equal(qz.log_probs(second, case_id), qz.log_probs(first, case_id))


@pytest.mark.parametrize("name", COPIED)
def test_weights_into_a_live_model(name: str, zoo: Any, packed_model: Any) -> None:
    case_id = case_of(name)
    folder = qz.build(zoo, case_id)
    model, expected = qz.load(folder, name), packed_model(name)
    if name == "gguf":
        for source in (qz.saved(folder, name), qz.saved(folder, name) / "model.gguf"):
            with pytest.raises(ArgumentError, match="weights go into new models only: pass it"):
                load_weights_(model, source)
        fresh = lean_model(folder)
        load_weights_(fresh, qz.load(folder, name, dequantize=True))  # what the error says to do
        assert qz.gap(qz.log_probs(fresh, case_id), qz.log_probs(expected, case_id)) < 1e-4
        return
    with torch.no_grad():
        model.embed.W_E.fill_(3.0)
        for weight in qz.quantized_parameters(model).values():
            weight.content.stored.map(torch.zero_)  # private mappings: the file stays
    assert qz.gap(qz.log_probs(model, case_id), qz.log_probs(expected, case_id)) > 1e-2
    load_weights_(model, qz.saved(folder, name))
    assert torch.equal(qz.log_probs(model, case_id), qz.log_probs(expected, case_id))
    plain = lean_model(folder)
    load_weights_(plain, qz.saved(folder, name))
    assert qz.gap(qz.log_probs(plain, case_id), qz.log_probs(expected, case_id)) < 1e-4


def test_every_kind_is_among_them() -> None:
    kinds = {kind for f in formats.FORMATS if f.name != "bitsandbytes" for kind in f.kinds}
    assert {packed.kind_of(name) for name in packed.ONE_OF_EACH} == kinds


@pytest.mark.parametrize("name", packed.ONE_OF_EACH)
def test_adapters_need_ordinary_weights(name: str, zoo: Any, tmp_path: Path) -> None:
    from tests.support import adapters  # needs peft

    if name == "mxfp4":
        pytest.skip("its attention has ordinary weights: below")
    folder = qz.build(zoo, "llama-gqa")
    adapter = adapters.for_case(
        "llama-gqa", folder, tmp_path / "adapter", target_modules=["q_proj"]
    )
    source = qz.saved(folder, name)
    with pytest.raises(ArgumentError, match=r"cannot be quantized again: pass dequantize="):
        lean_model(source, adapter=adapter)
    with pytest.raises(QuantizationError, match=r"cannot be quantized again.*dequantize=True"):
        lean_model(source, adapter=adapter, requantize=True)
    merged = lean_model(source, adapter=adapter, dequantize=True)
    plain = qz.dense_folder("llama-gqa", folder, name)
    expected = lean_model(plain, adapter=adapter, check_base=False)
    for key, value in expected.named_parameters():
        assert torch.equal(merged.get_parameter(key), value), key


def test_adapters_of_what_is_not_quantized(zoo: Any, tmp_path: Path) -> None:
    """LoRA on gpt-oss' attention leaves its experts' bytes alone."""
    from tests.support import adapters  # needs peft

    folder = qz.build(zoo, "gpt-oss")
    adapter = adapters.for_case("gpt-oss", folder, tmp_path / "adapter", target_modules=["q_proj"])
    source = qz.saved(folder, "mxfp4")
    with pytest.raises(ArgumentError, match="only weights that are not quantized"):
        lean_model(source, adapter=adapter)
    model = lean_model(source, adapter=adapter, requantize=True)
    plain = qz.dense_folder("gpt-oss", folder, "mxfp4")
    expected = lean_model(plain, adapter=adapter, check_base=False)
    assert len(qz.quantized_parameters(model)) == 9 * model.cfg.n_layers
    assert qz.gap(qz.log_probs(model, "gpt-oss"), qz.log_probs(expected, "gpt-oss")) < 1e-4
    assert qz.gap(qz.log_probs(model, "gpt-oss"), qz.log_probs(lean_model(plain), "gpt-oss")) > 1e-3


def test_quantized_anew(zoo: Any) -> None:
    """dequantize=True makes ordinary weights, which quantize= may quantize."""
    folder = qz.build(zoo, "llama-gqa")
    model = lean_model(qz.saved(folder, "fp8"), dequantize=True, quantize="nf4")
    expected = lean_model(qz.dense_folder("llama-gqa", folder, "fp8"), quantize="nf4")
    assert len(qz.quantized_parameters(model)) == 7 * model.cfg.n_layers
    assert torch.equal(qz.log_probs(model, "llama-gqa"), qz.log_probs(expected, "llama-gqa"))


def test_layers_in_memory(zoo: Any) -> None:
    """transformers' own layers, as it has them on a GPU: their bytes are shared."""
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    folder = qz.build(zoo, "llama-gqa")
    tensors = load_file(qz.saved(folder, "fp8") / "model.safetensors")
    hf = reference.hf_model("llama-gqa", folder)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        layer = name.removesuffix(".weight_scale_inv")
        codes = tensors[f"{layer}.weight"]
        made = module.FP8Linear(codes.shape[1], codes.shape[0], block_size=(32, 32))
        made.weight = torch.nn.Parameter(codes, requires_grad=False)
        made.weight_scale_inv = torch.nn.Parameter(tensors[name], requires_grad=False)
        hf.set_submodule(layer, made)
    model = lean_model(folder, hf_model=hf)
    assert model.load_report.quantization == "fp8, as in the checkpoint"
    held = qz.quantized_parameters(model)
    theirs = {p.data_ptr() for p in hf.parameters()}
    assert len(held) == 7 * model.cfg.n_layers
    assert {weight.content.stored.codes.data_ptr() for weight in held.values()} <= theirs
    expected = qz.hf_log_probs(folder, "fp8", "llama-gqa")
    assert qz.gap(qz.log_probs(model, "llama-gqa"), expected) < 1e-4


def test_a_model_that_transformers_has_dequantized(zoo: Any) -> None:
    """Its weights are ordinary, whatever its configuration says still."""
    folder = qz.build(zoo, "llama-gqa")
    source = qz.saved(folder, "fp8")
    hf = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = lean_model(folder, hf_model=hf)
    assert not qz.quantized_parameters(model)
    assert model.load_report.quantization is None


def _in_memory(folder: Path, name: str) -> Any:
    """transformers' model with the layers that the compressed-tensors library leaves there."""
    weights = packed.PACKINGS[name].declared["config_groups"]["group_0"]["weights"]
    tensors = load_file(qz.saved(folder, name) / "model.safetensors")
    hf = reference.hf_model("llama-gqa", folder)
    for layer in {key.rpartition(".")[0] for key in tensors if "weight_scale" in key}:
        module = hf.get_submodule(layer)
        del module.weight
        module.quantization_scheme = SimpleNamespace(weights=SimpleNamespace(**weights))
        module.quantization_status = "compressed"
        for key, value in tensors.items():
            if key.startswith(layer + "."):
                part = torch.nn.Parameter(value, requires_grad=False)
                module.register_parameter(key.rpartition(".")[2], part)
    return hf


@pytest.mark.parametrize("name", ["ct-rows", "ct-int-groups", "packed", "packed-zeros"])
def test_compressed_layers_in_memory(name: str, zoo: Any) -> None:
    """Their bytes are shared; what the library has decompressed is an ordinary weight."""
    folder = qz.build(zoo, "llama-gqa")
    hf, expected = _in_memory(folder, name), qz.hf_log_probs(folder, name, "llama-gqa")
    model = lean_model(folder, hf_model=hf)
    assert model.load_report.quantization == f"{packed.kind_of(name)}, as in the checkpoint"
    held = qz.quantized_parameters(model)
    assert len(held) == 7 * model.cfg.n_layers
    theirs = {part.data_ptr() for part in hf.parameters()}
    assert {next(iter(w.content.tensors().values())).data_ptr() for w in held.values()} <= theirs
    assert qz.gap(qz.log_probs(model, "llama-gqa"), expected) < 1e-4
    dense = load_file(qz.dense_folder("llama-gqa", folder, name) / "model.safetensors")
    for layer, module in hf.named_modules():
        if hasattr(module, "quantization_status"):
            module._parameters.pop("weight_packed", None)
            module.weight = torch.nn.Parameter(dense[f"{layer}.weight"])
            module.quantization_status = "decompressed"  # and scales stay beside it
    model = lean_model(folder, hf_model=hf)
    assert not qz.quantized_parameters(model)
    assert qz.gap(qz.log_probs(model, "llama-gqa"), expected) < 1e-4


class GptqLinear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


@pytest.mark.parametrize("name", ["GptqLinear", "FP8Experts", "Mxfp4GptOssExperts"])
def test_layers_that_cannot_be_read_in_memory(name: str, zoo: Any) -> None:
    """Kernels have bytes in orders of their own."""
    folder = qz.build(zoo, "llama-gqa")
    hf = reference.hf_model("llama-gqa", folder)
    hf.model.layers[1].mlp.up_proj = type(name, (GptqLinear,), {})()
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.up_proj.*folder .*not hf_model"):
        lean_model(folder, hf_model=hf)
