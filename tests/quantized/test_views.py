"""Processing of quantized models: every value is stock's, from the dequantized model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import quantized_zoo as qz
from tests.support import reference
from tests.support import zoo as zoo_module
from tests.support.comparison import lean_model, stock_model
from tl_fastload.errors import ArgumentError, LeanLoadError

KINDS = ["int8", "nf4", "nf4-double"]
# LayerNorm with fused projections, LayerNorm in parallel blocks, RMSNorm with grouped heads, ...
SOME = ["gpt2", "neox", "llama-gqa", "qwen2", "phi3", "gemma2", "mixtral"]


def _pair(zoo: Any, case_id: str, kind: str, **flags: Any) -> tuple[Any, Any]:
    """Stock's model of the dequantized weights, and the quantized one."""
    folder = qz.build(zoo, case_id)
    stock = stock_model(case_id, qz.dense_folder(case_id, folder, kind), **flags)
    return stock, lean_model(folder, hf_model=qz.hf_model(folder, kind), **flags)


def _assert_close(found: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    assert found.shape == expected.shape, what
    # Where nothing but rounding is left, it is measured in units of a typical bias.
    floor = 1e-2 * expected.numel() ** 0.5
    difference = (found.detach().double() - expected.detach().double()).norm()
    assert difference <= 1e-5 * max(float(expected.detach().double().norm()), floor), what


# Both kinds of every architecture are in test_quantized_fidelity.py, by what they compute.
@pytest.mark.parametrize(
    ("case_id", "kind"), [(case_id, ("int8", "nf4")[n % 2]) for n, case_id in enumerate(qz.CASES)]
)
def test_every_parameter_is_processed_as_stock_does(case_id: str, kind: str, zoo: Any) -> None:
    stock, lean = _pair(zoo, case_id, kind)
    expected, found = dict(stock.named_parameters()), qz.dense_values(lean)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "pos_embed.W_pos" and lean.cfg.positional_embedding_type == "alibi":
            continue  # memory that stock never writes nor reads
        _assert_close(found[name], value, name)


@pytest.mark.parametrize("off", ["fold_ln", "center_writing_weights", "center_unembed"])
@pytest.mark.parametrize("case_id", ["gpt2", "neox"])
def test_each_step_alone(case_id: str, off: str, zoo: Any) -> None:
    for flags in ({off: False}, {**reference.NO_PROCESSING, off: True}):
        stock, lean = _pair(zoo, case_id, "nf4-double", **flags)
        found = qz.dense_values(lean)
        for name, value in stock.named_parameters():
            _assert_close(found[name], value, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case_id", SOME)
def test_stacked_weights_and_circuits(case_id: str, kind: str, zoo: Any) -> None:
    stock, lean = _pair(zoo, case_id, kind)
    names = ["W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_E", "W_U", "b_U"]
    if case_id != "mixtral":
        names += ["W_in", "W_out", "b_in", "b_out"]
    if case_id in ("llama-gqa", "gemma2"):
        names.append("W_gate")
    for name in names:
        _assert_close(getattr(lean, name), getattr(stock, name), name)
    for name in ("OV", "QK"):
        ours, theirs = getattr(lean, name), getattr(stock, name)
        for side in ("A", "B"):
            _assert_close(getattr(ours, side), getattr(theirs, side), name)
        _assert_close(ours[0, 1].AB, theirs[0, 1].AB, name)
        _assert_close(ours[0, 1].norm(), theirs[0, 1].norm(), name)
    attention, theirs = lean.blocks[1].attn, stock.blocks[1].attn
    _assert_close(attention.OV[2].AB, theirs.OV[2].AB)
    _assert_close(attention.W_O[1], theirs.W_O[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case_id", ["gpt2", "neox", "gptj", "opt"])
def test_what_is_written_has_zero_mean(case_id: str, kind: str, zoo: Any) -> None:
    stock, model = _pair(zoo, case_id, kind)
    _, cache = model.run_with_cache(zoo_module.tokens(case_id))
    for name, value in cache.items():
        if name.endswith(("hook_attn_out", "hook_mlp_out", "hook_resid_post", "hook_embed")):
            assert value.mean(-1).abs().max() < 1e-5 * value.abs().max(), name
    assert torch.equal(model.blocks[0].attn.W_O.mean(-1).abs() < 1e-6, torch.ones(3, 64) > 0)
    assert model.accumulated_bias(1).mean().abs() < 1e-5
    _assert_close(model.accumulated_bias(1), stock.accumulated_bias(1))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("case_id", SOME)
def test_activations_are_stocks(case_id: str, kind: str, zoo: Any) -> None:
    """Every hook point has stock's name, and the meaning that processing gives it."""
    stock, model = _pair(zoo, case_id, kind)
    tokens = zoo_module.tokens(case_id)
    _, expected = stock.run_with_cache(tokens)
    _, found = model.run_with_cache(tokens)
    assert list(found) == list(expected)
    assert type(model.blocks[0].ln1) is type(stock.blocks[0].ln1)
    assert any(name.endswith("ln1.hook_scale") for name in found)
    assert any(name.endswith("ln1.hook_normalized") for name in found)
    for name, value in expected.items():
        if not name.startswith("blocks.0") and "embed" not in name:
            continue  # rounded activations of later layers part further
        if not value.is_floating_point() or not value.isfinite().all():
            continue  # which experts; masked scores
        bound = 1e-4 if kind == "nf4" else 5e-2
        assert qz.relative_gap(found[name], value) < bound, name


@pytest.mark.parametrize("road", ["hf_model", "saved"])
def test_refactoring_quantized_weights_is_refused(road: str, zoo: Any) -> None:
    folder = qz.build(zoo, "gpt2")
    source = {"hf_model": qz.hf_model(folder, "nf4")} if road == "hf_model" else {}
    where = folder if road == "hf_model" else qz.saved(folder, "nf4")
    with pytest.raises(ArgumentError, match=r"refactor_factored_attn_matrices.*quantize=") as info:
        lean_model(where, refactor_factored_attn_matrices=True, **source)
    assert isinstance(info.value, LeanLoadError)
