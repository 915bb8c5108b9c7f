"""Lean models under torch.compile: the numbers of the eager model."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from tests.support.comparison import lean_model
from tests.support.zoo import tokens
from tl_fastload import load_weights_

RAW = {
    "fold_ln": False,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
}
NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="inductor compiles C++, and there is no compiler here",
)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits(model: Any, case_id: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens(case_id))
    return found


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
def test_the_eager_backend(case_id: str, zoo: Any) -> None:
    model = lean_model(zoo(case_id), first_n_layers=1)
    expected = logits(model, case_id)
    compiled = torch.compile(model, backend="eager", fullgraph=case_id == "gpt2")
    assert torch.equal(logits(compiled, case_id), expected)
    # Other weights in the same memory: the compiled program goes on with them.
    other = {name: value * 1.5 for name, value in model.state_dict().items() if "W_" in name}
    load_weights_(compiled, other, strict=False)
    changed = logits(model, case_id)
    assert not torch.equal(changed, expected)
    assert torch.equal(logits(compiled, case_id), changed)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, RAW], ids=["processed", "raw"])
@pytest.mark.parametrize("case_id", ["gptj", "neox", "bloom", "phi3", "gemma2", "qwen3", "mixtral"])
def test_the_eager_backend_on_more_architectures(case_id: str, flags: Any, zoo: Any) -> None:
    model = lean_model(zoo(case_id), **flags)
    expected = logits(model, case_id)
    assert torch.equal(logits(torch.compile(model, backend="eager"), case_id), expected)


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "neox"])
def test_inductor(case_id: str, zoo: Any) -> None:
    """Its kernels are fused and sum in another order: equal within float32 rounding."""
    model = lean_model(zoo(case_id))
    expected = logits(model, case_id)
    found = logits(torch.compile(model), case_id)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("kind", "part"),
    [("8bit", "mlp"), pytest.param("8bit", "model", marks=pytest.mark.slow), ("nf4", "model")],
)
def test_quantized_weights(kind: str, part: str, zoo: Any) -> None:
    """4 bits in one graph; in 8 bits the kernels' search for outliers breaks it."""
    pytest.importorskip("bitsandbytes")
    from tests.support import quantized_zoo

    folder = quantized_zoo.build(zoo, "llama-gqa1-tied")
    model = lean_model(folder, quantize=kind, first_n_layers=1)
    expected = logits(model, "llama-gqa1-tied")
    if part == "mlp":  # dynamo takes seconds for all the graphs of a model
        model.blocks[0].mlp = torch.compile(model.blocks[0].mlp, backend="eager")
        assert torch.equal(logits(model, "llama-gqa1-tied"), expected)
        return
    compiled = torch.compile(model, backend="eager", fullgraph=kind == "nf4")
    assert torch.equal(logits(compiled, "llama-gqa1-tied"), expected)


@pytest.mark.parametrize(
    "kind",
    [
        *("fp8-ends", "fp8-powers", "ct-int-groups", "mxfp4"),
        *("gptq-8bit", "gptq-reordered", "awq", "packed", "gguf"),
    ],
)
def test_weights_that_are_dequantized_at_use(kind: str) -> None:
    """The product is one graph, with the decoding in it."""
    pytest.importorskip("bitsandbytes")
    from tests.support import quantized_kinds

    known = {k.name.rpartition("-")[0]: k for k in quantized_kinds.KINDS}[kind]
    weight, x = known.make(), known.activations(3, quantized_kinds.COLUMNS)
    compiled = torch.compile(lambda x: x @ weight.T, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x @ weight.T)


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("kind", ["8bit", "nf4"])
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa1-tied"])
def test_quantized_weights_with_inductor(case_id: str, kind: str, zoo: Any) -> None:
    pytest.importorskip("bitsandbytes")
    from tests.support import quantized_zoo

    model = lean_model(quantized_zoo.build(zoo, case_id), quantize=kind)
    expected = logits(model, case_id)
    found = logits(torch.compile(model), case_id)
    # An activation that inductor rounds the other way may fall on the next of 127 steps.
    bound = 1e-5 if kind == "nf4" else 1e-2
    assert (found - expected).abs().max() <= bound * expected.abs().max()


def test_fake_tensors_and_views() -> None:
    """What tracers do with a quantized tensor: only its bytes become fake."""
    pytest.importorskip("bitsandbytes")
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    from tl_fastload.quantized import quantize

    weight = quantize(torch.randn(64, 128), "int8")
    with FakeTensorMode() as mode:
        fake: Any = mode.from_tensor(weight)
        view = fake.view(4, 16, 128).permute(0, 2, 1).reshape(4, 128, 16)
        assert view.shape == (4, 128, 16)
        assert isinstance(view.content.stored.codes, FakeTensor)
        assert not isinstance(view.geometry, FakeTensor)
        assert fake[:16].contiguous().shape == (16, 128)
