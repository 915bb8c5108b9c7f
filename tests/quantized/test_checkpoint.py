"""Quantized bytes from what transformers saves, for its own layers and for `Conv1D`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tl_fastload import quantized
from tl_fastload.errors import QuantizationError
from tl_fastload.quantized import assemble, formats
from tl_fastload.quantized.formats import bitsandbytes
from tl_fastload.quantized.formats import bitsandbytes_kernels as kernels
from tl_fastload.quantized.recipes import QuantizedSource
from tl_fastload.recipes.evaluate import sources
from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise

CONFIGS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 4.0},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
    },
}
LLAMA = "model.layers.0.mlp.down_proj"
GPT2 = "transformer.h.0.mlp.c_fc"


def _model(architecture: str) -> Any:
    torch.manual_seed(0)
    if architecture == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=40))
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, **sizes))


@pytest.fixture(scope="module", params=[(a, c) for a in ("llama", "gpt2") for c in CONFIGS])
def saved(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, str]:
    """(dense model, quantized model, its saved tensors, a layer's name)."""
    architecture, config = request.param
    folder: Path = tmp_path_factory.mktemp("model")
    dense = _model(architecture)
    dense.save_pretrained(folder / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "dense",
        quantization_config=BitsAndBytesConfig(**CONFIGS[config]),
        device_map={"": "cpu"},
    )
    model.save_pretrained(folder / "quantized")
    tensors = load_file(folder / "quantized" / "model.safetensors")
    return dense, model, tensors, GPT2 if architecture == "gpt2" else LLAMA


def _pieces(saved: Any) -> dict[str, torch.Tensor]:
    _, _, tensors, layer = saved
    prefix = f"{layer}."
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _read(pieces: dict[str, torch.Tensor], threshold: float = 6.0) -> Any:
    spec = bitsandbytes.BitsAndBytesSpec("int8", threshold=threshold)
    return bitsandbytes.BitsAndBytes().assemble(pieces, spec)


def test_saved_pieces_are_the_layer(saved: Any) -> None:
    _, model, _, name = saved
    layer = model.get_submodule(name)
    pieces = _pieces(saved)
    threshold = CONFIGS["int8"]["llm_int8_threshold"]
    stored = _read(pieces, threshold)
    read = quantized.from_bytes(stored, dtype=torch.float32)
    in_memory = formats.of_layer(layer, name)
    assert in_memory is not None
    taken = quantized.from_bytes(in_memory[0], dtype=torch.float32)
    assert read.content.stored.plain() == taken.content.stored.plain()
    for field, tensor in taken.content.tensors().items():
        assert torch.equal(read.content.tensors()[field], tensor), field
    assert pieces["weight"].data_ptr() in {t.data_ptr() for t in read.content.tensors().values()}
    x = torch.randn(2, 5, read.shape[1])
    bias = None if layer.bias is None else layer.bias.detach().clone()
    layer.support_avx512bf16_for_cpu = False
    assert torch.equal(F.linear(x, read, bias), layer(x))


def test_bytes_on_their_way_to_a_device_need_no_kernel_where_they_lie(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_cuda(device: torch.device) -> None:
        raise QuantizationError(f"no kernels for device {device}")

    monkeypatch.setattr(kernels, "require_device", only_cuda)
    pieces = _pieces(saved)
    promises = {
        f"layer.{piece}": Promise.of(MemorySource(tensor, piece))
        for piece, tensor in pieces.items()
        if piece != "bias"
    }
    kind = next((one for one in ("nf4", "fp4") if any(one in piece for piece in pieces)), "int8")
    spec = bitsandbytes.BitsAndBytesSpec(kind)
    made = assemble.combine(promises, spec, torch.float32)["layer.weight"]
    (view,) = sources(made.node)
    assert isinstance(view.source, QuantizedSource)
    stored = view.source.matrix().content.stored
    assert pieces["weight"].data_ptr() in {t.data_ptr() for t in stored.tensors().values()}


def test_conv1d_weights_are_stored_as_a_linear_layer(saved: Any) -> None:
    """`Conv1D` holds [in, out]; quantized, transformers makes it a linear layer's [out, in]."""
    dense, _, _, name = saved
    weight = dense.get_submodule(name).weight.detach()
    stored = _read(_pieces(saved))
    expected = weight.T if name == GPT2 else weight
    found = quantized.from_bytes(stored, dtype=torch.float32)
    assert found.shape == expected.shape
    assert (found.dequantize() - expected).norm() < 0.15 * expected.norm()
    if name == GPT2:
        x, bias = torch.randn(7, weight.shape[0]), torch.randn(weight.shape[1])
        assert isinstance(found.T, quantized.QuantizedTensor)
        product = torch.addmm(bias, x, found.T)
        assert torch.equal(product, F.linear(x, found, bias))


def test_every_piece_has_a_known_name(saved: Any) -> None:
    known = bitsandbytes.INT8_PARTS | bitsandbytes.FOUR_BIT_PARTS
    assert set(_pieces(saved)) - {"weight", "bias"} <= known


@pytest.mark.parametrize(
    "saved", [("llama", "int8"), ("llama", "fp4-double")], indirect=True, ids=["int8", "4bit"]
)
def test_missing_or_misshapen_pieces(saved: Any) -> None:
    pieces = {name: tensor for name, tensor in _pieces(saved).items() if name != "weight_format"}
    assert len(pieces) > 1
    for name, tensor in pieces.items():
        rest = {key: value for key, value in pieces.items() if key != name}
        for wrong in (rest, {**rest, name: tensor.flatten()[:-1]}):
            with pytest.raises(
                QuantizationError,
            ):
                _read(wrong)


def _state(text: str) -> dict[str, torch.Tensor]:
    state = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return {
        "weight": torch.zeros(32, 1, dtype=torch.uint8),
        "weight.absmax": torch.ones(1),
        "weight.quant_map": torch.zeros(16),
        "weight.quant_state.bitsandbytes__nf4": state,
    }


def test_the_state_as_bitsandbytes_writes_it() -> None:
    text = '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [1, 64]}'
    stored = _read(_state(text))
    assert (stored.kind, stored.shape) == ("nf4", (1, 64))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable"),
        ("[]", "not a table"),
        ("{}", "does not describe"),
        ('{"quant_type": "nf4", "blocksize": 64, "dtype": "x", "shape": [1, 64]}', "not a dtype"),
        (
            '{"quant_type": "nf4", "blocksize": 0, "dtype": "float32", "shape": [1, 64]}',
            "block size",
        ),
        ('{"quant_type": "af4", "blocksize": 64, "dtype": "float32", "shape": [1, 64]}', "af4"),
        ('{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64]}', "describe"),
        ('{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64]}', "packed"),
    ],
)
def test_unreadable_states(text: str, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        _read(_state(text))


def test_weights_that_are_not_bitsandbytes() -> None:
    with pytest.raises(QuantizationError, match="float32"):
        _read({"weight": torch.zeros(4, 4)})
    codes = torch.zeros(4, 4, dtype=torch.int8)
    turing = {"weight": codes, "SCB": torch.ones(4), "weight_format": torch.tensor(2)}
    with pytest.raises(QuantizationError, match="one kind of GPU"):
        _read(turing)
