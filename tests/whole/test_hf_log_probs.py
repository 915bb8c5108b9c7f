"""Log-probabilities are Hugging Face's own, also where stock's are wrong."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support import reference
from tests.support.comparison import lean_model, log_probs
from tests.support.reference import STOCK_WRONG, StockWrong
from tests.support.zoo import CASES, tokens
from tl_fastload.errors import (
    LeanLoadError,
    MissingWeightsError,
    NumbersWarning,
    UnsupportedArchitectureError,
)

TOLERANCE = 1e-4
PROCESSING: dict[str, dict[str, bool]] = {"processed": {}, "unprocessed": reference.NO_PROCESSING}
HF_CASES = [name for name, case in CASES.items() if case.kind == "hf"]
NO_POWER_OF_TWO = ("bloom-5-heads",)


@dataclass(frozen=True)
class Refused:
    """Loading raises `error`, and its message names `feature`."""

    error: type[LeanLoadError]
    feature: str


RIGHT = "right"
WARNED = "warned of"
_BIASES = Refused(MissingWeightsError, "self_attn.q_proj.bias")

OUTCOMES: dict[str, str | Refused] = {
    "attention sinks make pattern rows sum to less than one, so b_V does not fold": RIGHT,
    "ALiBi slopes for a head count that is no power of two": WARNED,
    "drops the attention biases": _BIASES,
    "drops the MLP biases": Refused(MissingWeightsError, "mlp.gate_proj.bias"),
    "ignores linear rope scaling": RIGHT,
    "ignores yarn rope scaling": RIGHT,
    "ignores the sliding window": RIGHT,
    "drops the query and key norms": Refused(UnsupportedArchitectureError, "qk_layernorm"),
    "ignores longrope's factors": RIGHT,
    "folds norms into the wrong side of a square matrix": RIGHT,
    "rotates whole heads": RIGHT,
    "takes 1e-5 for the epsilon": RIGHT,
    "takes the residual before the norm": Refused(
        UnsupportedArchitectureError, "apply_residual_connection_post_layernorm"
    ),
    "ignores the logit soft-cap": RIGHT,
    "clamps the experts at 7 always": Refused(UnsupportedArchitectureError, "swiglu_limit"),
}
"""What we do where stock is silently wrong: compute it right, refuse it, or warn of it."""


@pytest.mark.parametrize("case_id", [name for name in HF_CASES if name not in NO_POWER_OF_TWO])
def test_log_probs_are_those_of_transformers(case_id: str, zoo: Any) -> None:
    folder = zoo(case_id)
    wanted = reference.hf_log_probs(case_id, folder, tokens(case_id))
    for processing, flags in PROCESSING.items():
        lean = lean_model(folder, **flags)
        assert (log_probs(lean, case_id) - wanted).abs().max() < TOLERANCE, processing


@pytest.mark.parametrize("processing", PROCESSING)
@pytest.mark.parametrize("wrong", STOCK_WRONG, ids=lambda wrong: f"{wrong.case_id}-{wrong.why}")
def test_what_stock_gets_wrong(wrong: StockWrong, processing: str, zoo: Any) -> None:
    folder = zoo(wrong.case_id, **wrong.overrides)
    flags = {**PROCESSING[processing], **wrong.flags}
    outcome = OUTCOMES[wrong.why]
    if isinstance(outcome, Refused):
        with pytest.raises(outcome.error, match=outcome.feature):
            lean_model(folder, **flags)
        return
    wanted = reference.hf_log_probs(wrong.case_id, folder, tokens(wrong.case_id))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", NumbersWarning)
        lean = lean_model(folder, **flags)
    told = [text for text in told if text.category is NumbersWarning]
    apart = (log_probs(lean, wrong.case_id) - wanted).abs().max()
    if outcome == RIGHT:
        assert apart < TOLERANCE
        assert not told
    else:
        assert apart > TOLERANCE  # else the warning is out of date
        assert [str(text.message) in lean.load_report.notes for text in told] == [True]
        assert "ALiBi slopes" in str(told[0].message)


def test_every_outcome_is_met() -> None:
    assert {wrong.why for wrong in STOCK_WRONG} == OUTCOMES.keys()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "gemma2", "olmoe"])
def test_log_probs_in_half_precision_are_near(case_id: str, dtype: str, zoo: Any) -> None:
    """Within what the dtype resolves: far closer than any misplaced weight would allow."""
    folder = zoo(case_id)
    wanted = reference.hf_log_probs(case_id, folder, tokens(case_id))
    lean = lean_model(folder, dtype=dtype)
    mean = (log_probs(lean, case_id) - wanted).abs().mean()
    assert mean < (0.01 if dtype == "float16" else 0.08)
