"""Which processing steps a model allows: what the report says is what happened."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformer_lens import HookedTransformer

from tests.support import reference
from tests.support.comparison import STEPS, changed, lean_model, log_probs, values
from tl_fastload.hooked import steps
from tl_fastload.request.steps import STEPS as ALL_STEPS
from tl_fastload.roads.known import describe_steps

# step -> cases that forbid it, a word of the reason
FORBIDDEN: dict[str, dict[str, str]] = {
    "fold_ln": {
        "olmo2": "after each sublayer",
        "olmo3": "after each sublayer",
        "shortformer": "shortformer",
    },
    "center_writing_weights": {
        "llama-gqa": "RMSNorm",
        "mixtral": "RMSNorm",
        "gemma2": "RMSNorm",
        "olmo2": "after each sublayer",
        "shortformer": "shortformer",
    },
    "center_unembed": {"gemma2": "soft cap", "shortformer": "shortformer"},
    "fold_value_biases": {"gpt-oss": "sinks"},
}
# step -> cases that allow it and have something to do it on
ALLOWED: dict[str, tuple[str, ...]] = {
    "fold_ln": ("gpt2", "llama-gqa", "gemma2", "mixtral", "solu", "gpt-oss"),
    "center_writing_weights": ("gpt2", "neox", "attn-only", "olmo"),
    "center_unembed": ("gpt2", "llama-gqa", "olmo2", "gpt-oss"),
    "fold_value_biases": ("gpt2", "qwen2", "shortformer", "bloom"),
}


def _pairs(table: dict[str, Any]) -> list[tuple[str, str]]:
    return [(step, case_id) for step, cases in table.items() for case_id in cases]


@pytest.mark.parametrize(("step", "case_id"), _pairs(FORBIDDEN))
def test_a_forbidden_step_is_skipped_and_the_report_says_why(
    step: str, case_id: str, zoo: Any
) -> None:
    folder = zoo(case_id)
    raw = lean_model(folder, **reference.NO_PROCESSING)
    lean = lean_model(folder, **{**reference.NO_PROCESSING, step: True})
    assert changed(values(raw), lean) == []
    outcome = lean.load_report.processing[step]
    assert outcome.startswith("skipped: ")
    assert FORBIDDEN[step][case_id] in outcome


@pytest.mark.parametrize(("step", "case_id"), _pairs(ALLOWED))
def test_an_allowed_step_is_done_and_keeps_the_function(step: str, case_id: str, zoo: Any) -> None:
    folder = zoo(case_id)
    raw = lean_model(folder, **reference.NO_PROCESSING)
    lean = lean_model(folder, **{**reference.NO_PROCESSING, step: True})
    assert changed(values(raw), lean) != []
    assert (log_probs(lean, case_id) - log_probs(raw, case_id)).abs().max() < 1e-4
    done = [name for name, outcome in lean.load_report.processing.items() if outcome == "done"]
    assert done == [step]


def test_every_step_is_in_both_tables() -> None:
    assert set(FORBIDDEN) == set(ALLOWED) == set(STEPS)
    assert [*STEPS, "refactor_factored_attn_matrices"] == list(ALL_STEPS)


def _cfg(**fields: Any) -> SimpleNamespace:
    """The configuration of a model that allows every step, but for `fields`."""
    plain = {
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
        "original_architecture": "GPT2LMHeadModel",
        "output_logits_soft_cap": -1.0,
        "use_attention_sinks": False,
        "final_rms": False,
    }
    return SimpleNamespace(**{**plain, **fields})


def _model(cfg: Any) -> Any:
    model: Any = object.__new__(HookedTransformer)
    model.__dict__["cfg"] = cfg
    return model


def test_a_plain_model_allows_everything() -> None:
    assert [steps.reason_to_skip(step, _cfg()) for step in ALL_STEPS] == [None] * 5
    requested = dict.fromkeys(ALL_STEPS, True)
    assert describe_steps(_model(_cfg()), requested) == dict.fromkeys(ALL_STEPS, "done")


@pytest.mark.parametrize(
    ("fields", "forbidden"),
    [
        ({"normalization_type": None}, {"fold_ln"}),
        ({"normalization_type": "RMS"}, {"center_writing_weights"}),
        ({"final_rms": True}, {"center_writing_weights"}),
        ({"output_logits_soft_cap": 30.0}, {"center_unembed"}),
        ({"output_logits_soft_cap": None}, set()),
        ({"use_attention_sinks": True}, {"fold_value_biases"}),
        ({"positional_embedding_type": "rotary"}, {"refactor_factored_attn_matrices"}),
        ({"positional_embedding_type": "shortformer"}, set(STEPS[:3])),
        ({"original_architecture": "Olmo3ForCausalLM"}, set(STEPS[:2])),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_each_reason_alone(fields: dict[str, Any], forbidden: set[str]) -> None:
    found = {step for step in ALL_STEPS if steps.reason_to_skip(step, _cfg(**fields))}
    assert found == forbidden


def test_what_nobody_asked_for_is_called_so() -> None:
    described = describe_steps(_model(_cfg(use_attention_sinks=True)), {"fold_ln": True})
    assert described.pop("fold_ln") == "done"
    assert set(described.values()) == {"skipped: not asked for"}
