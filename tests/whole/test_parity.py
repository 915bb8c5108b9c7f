"""Every architecture, dtype and combination of flags: the model is stock's, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer

from tests.support import reference
from tests.support.comparison import (
    STEPS,
    differences,
    lean_model,
    log_probs,
    run,
    stock_model,
)
from tests.support.zoo import CASES, tokens

pytestmark = pytest.mark.parity

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}
PROCESSING: dict[str, dict[str, bool]] = {"processed": {}, "unprocessed": reference.NO_PROCESSING}

# LayerNorm, LayerNorm in parallel blocks, RMSNorm with grouped heads, norms after the sublayer and
# soft caps, experts, a norm inside the MLP, no MLP, and positions in queries and keys only.
EVERY_COMBINATION = (
    "gpt2",
    "neox",
    "llama-gqa",
    "gemma2",
    "mixtral",
    "solu",
    "attn-only",
    "shortformer",
)
ONE_OF_EACH = {case.architecture: name for name, case in reversed(CASES.items())}.values()
ALIBI = ("bloom", "bloom-hub", "bloom-5-heads")
EXPERTS = ("mixtral", "olmoe", "olmoe-gqa")

INTENDED: dict[str, tuple[tuple[str, ...], str]] = {
    "pos_embed.W_pos is zero": (ALIBI, "stock leaves memory there that nobody has written"),
    "experts have cfg.dtype": (EXPERTS, "stock's stay in float32, and its forward pass fails"),
    "b_V is not folded": (("gpt-oss",), "attention sinks: pattern rows sum to less than one"),
    "grouped heads load": (("olmo2",), "stock's converter takes as many heads as for queries"),
    "norms keep their weights": (("mixtral", "gpt-oss"), "TransformerLens 2 drops, and folds not"),
    "rotary tables": (("gpt-oss", "gemma3-vision"), "TransformerLens 2 lacks yarn and local bases"),
}
"""Where we differ from stock on purpose: what -> cases, why. Each has a test of its own below; of
the tables, `test_hf_log_probs` is the judge."""


def _flags_off() -> list[tuple[str, dict[str, bool]]]:
    """Cases with flags, beside none and all of them off, which are in the tests above.

    Of what differs in its norms and parts: each flag alone off, and half of the other combinations,
    so that two of these share each. Of all architectures: each flag once on and once off, beside
    another one each time.
    """
    every = list(itertools.product((True, False), repeat=len(STEPS)))
    several = [on for on in every if on.count(False) in (2, 3)]
    found = []
    for number, case_id in enumerate(dict.fromkeys((*EVERY_COMBINATION, *ONE_OF_EACH))):
        if case_id in EVERY_COMBINATION:
            wanted = [on for on in every if on.count(False) == 1] + several[number % 2 :: 2]
        else:
            pairs = [on for on in every if on.count(False) == 2 and on[0]]
            one = pairs[number % len(pairs)]
            wanted = [one, tuple(not flag for flag in one)]
        found += [(case_id, dict(zip(STEPS, on, strict=True))) for on in wanted]
    return found


def _dtypes_and_processing() -> list[Any]:
    """Each case in each dtype and in each processing; each pair of these in half of the cases."""
    found = []
    for number, case_id in enumerate(CASES):
        for other, dtype in enumerate(name for name in DTYPES if name != "float32"):
            processing = list(PROCESSING)[(number + other) % 2]
            found.append((case_id, dtype, processing))
    return found


def _flags_id(value: object) -> str:
    if isinstance(value, dict):
        return "without-" + "-".join(name for name, on in value.items() if not on)
    return str(value)


@pytest.mark.parametrize(("case_id", "dtype", "processing"), _dtypes_and_processing())
def test_same_model(case_id: str, dtype: str, processing: str, zoo: Any) -> None:
    folder, flags = zoo(case_id), {"dtype": DTYPES[dtype], **PROCESSING[processing]}
    apart = differences(stock_model(case_id, folder, **flags), lean_model(folder, **flags))
    assert apart == []


@pytest.mark.parametrize("processing", PROCESSING)
@pytest.mark.parametrize("case_id", CASES)
def test_same_model_and_numbers_in_float32(case_id: str, processing: str, zoo: Any) -> None:
    folder, flags = zoo(case_id), PROCESSING[processing]
    stock, lean = stock_model(case_id, folder, **flags), lean_model(folder, **flags)
    apart = differences(stock, lean)
    assert apart == []
    wanted, wanted_cache = run(stock, case_id)
    logits, cache = run(lean, case_id)
    assert list(cache) == list(wanted_cache)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache, wanted_cache, rtol=1e-5, atol=1e-5)
    _take_strides_of(stock, lean)
    logits, cache = run(lean, case_id)
    assert torch.equal(logits, wanted)
    assert [name for name in cache if not torch.equal(cache[name], wanted_cache[name])] == []


def _take_strides_of(stock: HookedTransformer, lean: HookedTransformer) -> None:
    """Store the lean parameters as stock's are, so that every kernel gets the same memory."""
    for (_, wanted), (_, found) in zip(
        stock.named_parameters(), lean.named_parameters(), strict=True
    ):
        found.data = torch.empty_like(wanted).copy_(found)


@pytest.mark.parametrize(("case_id", "flags"), _flags_off(), ids=_flags_id)
def test_same_model_with_flags(case_id: str, flags: dict[str, bool], zoo: Any) -> None:
    folder = zoo(case_id)
    apart = differences(stock_model(case_id, folder, **flags), lean_model(folder, **flags))
    assert apart == []


@pytest.mark.parametrize("processing", PROCESSING)
@pytest.mark.parametrize(
    "case_id", ["gpt2", "gpt-neo", "opt", "bloom", "santacoder", "solu", "shortformer", "othello"]
)
def test_same_model_with_even_factors(case_id: str, processing: str, zoo: Any) -> None:
    folder = zoo(case_id)
    flags = {"refactor_factored_attn_matrices": True, **PROCESSING[processing]}
    stock, lean = stock_model(case_id, folder, **flags), lean_model(folder, **flags)
    apart = differences(stock, lean)
    assert apart == []
    plain = lean_model(folder, **PROCESSING[processing])
    assert not torch.equal(plain.blocks[0].attn.W_Q, lean.blocks[0].attn.W_Q)


def test_the_intended_differences_are_these() -> None:
    assert {what: len(cases) for what, (cases, _) in INTENDED.items()} == {
        "pos_embed.W_pos is zero": 3,
        "experts have cfg.dtype": 3,
        "b_V is not folded": 1,
        "grouped heads load": 1,
        "norms keep their weights": 2,
        "rotary tables": 2,
    }


@pytest.mark.parametrize("processing", PROCESSING)
@pytest.mark.parametrize("case_id", ALIBI)
def test_alibi_models_have_zeros_for_positions(case_id: str, processing: str, zoo: Any) -> None:
    lean = lean_model(zoo(case_id), **PROCESSING[processing])
    assert lean.pos_embed.W_pos.count_nonzero() == 0
    before = log_probs(lean, case_id)
    lean.pos_embed.W_pos.data.fill_(float("nan"))
    assert torch.equal(log_probs(lean, case_id), before)  # nobody reads it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case_id", EXPERTS)
def test_experts_have_the_dtype_and_run(case_id: str, dtype: torch.dtype, zoo: Any) -> None:
    folder = zoo(case_id)
    lean = lean_model(folder, dtype=dtype)
    assert {parameter.dtype for parameter in lean.parameters()} == {dtype}
    assert any("Expert layers are" in note for note in lean.load_report.notes)
    with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
        stock_model(case_id, folder, dtype=dtype)(tokens(case_id))
    assert log_probs(lean, case_id).isfinite().all()
    if dtype == torch.float64:
        wanted = log_probs(lean_model(folder), case_id)
        assert (log_probs(lean, case_id) - wanted).abs().max() < 1e-4


def test_value_biases_stay_where_attention_has_sinks(zoo: Any) -> None:
    folder = zoo("gpt-oss")
    lean = lean_model(folder, fold_value_biases=True)
    assert lean.blocks[0].attn.b_V.abs().max() > 0.1
    assert lean.load_report.processing["fold_ln"] == "done"
    skipped = lean.load_report.processing["fold_value_biases"]
    assert skipped.startswith("skipped: attention sinks")
    wanted = reference.hf_log_probs("gpt-oss", folder, tokens("gpt-oss"))
    stock = reference.stock_model("gpt-oss", folder, device="cpu")
    assert (log_probs(lean, "gpt-oss") - wanted).abs().max() < 1e-4
    assert (log_probs(stock, "gpt-oss") - wanted).abs().max() > 0.5


@pytest.mark.parametrize("processing", PROCESSING)
def test_olmo2_with_grouped_heads(processing: str, zoo: Any) -> None:
    sizes = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2}
    folder = zoo("olmo2", **sizes)
    with pytest.raises(RuntimeError):
        stock_model("olmo2", folder)
    lean = lean_model(folder, **PROCESSING[processing])
    wanted = reference.hf_log_probs("olmo2", folder, tokens("olmo2"))
    assert (log_probs(lean, "olmo2") - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("case_id", ["mixtral", "gpt-oss"])
def test_norms_in_front_of_experts_keep_their_weights(case_id: str, zoo: Any) -> None:
    folder = zoo(case_id)
    lean = lean_model(folder)
    assert lean.cfg.normalization_type == "RMS"
    assert lean.load_report.processing["fold_ln"].startswith("skipped: TransformerLens 2")
    assert any("norms keep their weights" in note for note in lean.load_report.notes)
    raw = log_probs(lean_model(folder, **reference.NO_PROCESSING), case_id)
    stock = reference.stock_model(case_id, folder, device="cpu")
    assert (log_probs(lean, case_id) - raw).abs().max() < 1e-4
    assert (log_probs(stock, case_id) - raw).abs().max() > 0.1
    if case_id == "mixtral":  # of gpt-oss, no number of TransformerLens 2 is right
        wanted = reference.hf_log_probs(case_id, folder, tokens(case_id))
        assert (log_probs(lean, case_id) - wanted).abs().max() < 1e-4
