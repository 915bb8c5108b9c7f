"""Processing a live model, and state dicts that the caller holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer

from tests.support import reference
from tests.support.comparison import (
    changed,
    differences,
    lean_model,
    log_probs,
    stock_model,
    values,
)
from tests.support.zoo import tokens
from tl_fastload import LeanHookedTransformer
from tl_fastload.errors import LeanLoadError, MissingWeightsError

pytestmark = pytest.mark.parity

RAW = reference.NO_PROCESSING
SEVERAL = (
    "gpt2",
    "neox",
    "bloom",
    "opt",
    "llama-gqa",
    "llama-gqa1-tied",
    "qwen2",
    "qwen3",
    "gemma3",
    "mixtral",
    "phi",
    "santacoder",
    "solu",
    "attn-only",
)
# Which of stock's guards only `from_pretrained` has: a shift of soft-capped logits, the norms after
# each sublayer, positions that only queries and keys see.
GUARDED = ("gemma2", "olmo2", "olmo3-gqa", "shortformer", "gpt-oss")


def raw_pair(case_id: str, zoo: Any) -> tuple[HookedTransformer, LeanHookedTransformer]:
    """The unprocessed model of a case, from stock and lean."""
    folder = zoo(case_id)
    lean = LeanHookedTransformer.from_pretrained_no_processing_lean(
        folder, device="cpu", progress=False
    )
    return stock_model(case_id, folder, **RAW), lean


@pytest.mark.parametrize("case_id", SEVERAL)
def test_process_weights_gives_stocks_numbers(case_id: str, zoo: Any) -> None:
    stock, lean = raw_pair(case_id, zoo)
    wanted = log_probs(stock, case_id)
    names = {id(parameter): name for name, parameter in lean.named_parameters()}
    stock.process_weights_()
    lean.process_weights_()
    apart = differences(stock, lean)
    assert apart == []
    assert {n for n, p in lean.named_parameters() if names.get(id(p)) != n} == set()
    assert (log_probs(lean, case_id) - wanted).abs().max() < 1e-4
    assert lean.load_report.processing["fold_value_biases"] == "done"


@pytest.mark.parametrize(
    "flags",
    [
        {"fold_ln": False},
        {"center_unembed": False, "center_writing_weights": False},
        {"refactor_factored_attn_matrices": True},
    ],
    ids=str,
)
def test_process_weights_does_what_is_asked_for(flags: dict[str, bool], zoo: Any) -> None:
    stock, lean = raw_pair("gpt2", zoo)
    stock.process_weights_(**flags)
    lean.process_weights_(**flags)
    apart = differences(stock, lean)
    assert apart == []
    for step, outcome in lean.load_report.processing.items():
        on = flags.get(step, step != "refactor_factored_attn_matrices")
        assert outcome == ("done" if on else "skipped: not asked for"), step


@pytest.mark.parametrize("case_id", GUARDED)
def test_process_weights_never_changes_what_a_model_computes(case_id: str, zoo: Any) -> None:
    """A step that would change it is skipped, and the report says so."""
    _, lean = raw_pair(case_id, zoo)
    wanted = log_probs(lean, case_id)
    lean.process_weights_()
    assert (log_probs(lean, case_id) - wanted).abs().max() < 1e-4
    outcomes = lean.load_report.processing.values()
    assert any(outcome.startswith("skipped: ") for outcome in outcomes)


@pytest.mark.parametrize("case_id", GUARDED)
def test_a_loaded_state_dict_never_changes_what_a_model_computes(case_id: str, zoo: Any) -> None:
    _, lean = raw_pair(case_id, zoo)
    wanted = log_probs(lean, case_id)
    lean.load_and_process_state_dict(values(lean))
    assert (log_probs(lean, case_id) - wanted).abs().max() < 1e-4


def test_process_weights_after_training(zoo: Any) -> None:
    """The optimizer goes on holding the parameters that the model uses."""
    stock, lean = raw_pair("gpt2", zoo)
    losses: list[list[float]] = []
    for model in (stock, lean):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        _train(model, optimizer, steps=1)
        model.process_weights_()
        losses.append(_train(model, optimizer, steps=3))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1][2] < losses[1][1] < losses[1][0]


def _train(model: HookedTransformer, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(tokens("gpt2"), return_type="loss")
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_second_call_does_nothing_and_says_so(zoo: Any) -> None:
    _, lean = raw_pair("gpt2", zoo)
    lean.process_weights_()
    before, report = values(lean), lean.load_report
    lean.process_weights_()
    assert changed(before, lean) == []
    assert lean.load_report.notes[:-1] == report.notes
    assert "nothing was done" in lean.load_report.notes[-1]


def test_a_processed_load_is_not_processed_again(zoo: Any) -> None:
    lean = lean_model(zoo("gpt2"))
    before = values(lean)
    lean.process_weights_()
    assert changed(before, lean) == []
    assert "nothing was done" in lean.load_report.notes[-1]


def _edit_in_place(model: HookedTransformer) -> None:
    with torch.no_grad():
        model.unembed.W_U.mul_(1.5).add_(0.25)


def _edit_data(model: HookedTransformer) -> None:
    """The way that does not count up the parameter's version."""
    model.unembed.W_U.data.mul_(1.5).add_(0.25)


def _edit_by_assignment(model: HookedTransformer) -> None:
    model.unembed.W_U.data = model.unembed.W_U.data * 1.5 + 0.25


def _edit_by_loading(model: HookedTransformer) -> None:
    model.load_state_dict({"unembed.W_U": model.unembed.W_U * 1.5 + 0.25}, strict=False)


@pytest.mark.parametrize(
    "edit", [_edit_in_place, _edit_data, _edit_by_assignment, _edit_by_loading]
)
def test_an_edited_model_is_processed_again(
    edit: Callable[[HookedTransformer], None], zoo: Any
) -> None:
    stock, lean = raw_pair("gpt2", zoo)
    for model in (stock, lean):
        model.process_weights_()
        edit(model)
        model.process_weights_()
    assert lean.unembed.W_U.mean(-1).abs().max() < 1e-6
    apart = differences(stock, lean)
    assert apart == []


def test_steps_that_were_not_done_yet_are(zoo: Any) -> None:
    folder = zoo("gpt2")
    stock = stock_model("gpt2", folder, center_unembed=False)
    lean = lean_model(folder, center_unembed=False)
    for model in (stock, lean):
        model.process_weights_()
    apart = differences(stock, lean)
    assert apart == []
    assert lean.unembed.W_U.mean(-1).abs().max() < 1e-6


def test_processing_a_mapped_model_leaves_the_file_and_other_models_alone(zoo: Any) -> None:
    folder = zoo("llama-gqa")
    files = _file_bytes(folder)
    lean, other = (lean_model(folder, mmap=True, **RAW) for _ in range(2))
    assert lean.load_report.mapped_bytes > 0
    before = values(other)
    lean.process_weights_()
    assert _file_bytes(folder) == files
    assert changed(before, other) == []
    stock = stock_model("llama-gqa", folder, **RAW)
    stock.process_weights_()
    apart = differences(stock, lean)
    assert apart == []


def _file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "mixtral", "attn-only"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_and_process_state_dict(case_id: str, dtype: str, zoo: Any) -> None:
    folder = zoo(case_id)
    stock = stock_model(case_id, folder, dtype=dtype, **RAW)
    lean = lean_model(folder, dtype=dtype, **RAW)
    scaled = {name: tensor * 1.25 for name, tensor in stock.state_dict().items()}
    state_dict, addresses = dict(scaled), [tensor.data_ptr() for tensor in scaled.values()]
    before = {name: tensor.clone() for name, tensor in scaled.items()}
    stock.load_and_process_state_dict(dict(before))
    lean.load_and_process_state_dict(state_dict)
    apart = differences(stock, lean)
    assert apart == []
    # The caller's dictionary is as it was, and shares no memory with the model.
    assert list(state_dict) == list(before)
    assert [tensor.data_ptr() for tensor in state_dict.values()] == addresses
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_dict.items())
    loaded = values(lean)
    for tensor in state_dict.values():
        tensor.fill_(7)
    assert changed(loaded, lean) == []
    assert lean.load_report.source == "state_dict"


def test_norms_and_biases_are_taken_from_the_model_only_as_it_was_made(zoo: Any) -> None:
    stock, lean = raw_pair("gpt2", zoo)
    weights = {name: tensor for name, tensor in values(stock).items() if "W_" in name}
    before = values(lean)
    with pytest.raises(MissingWeightsError, match=r"lacks blocks\.0\.ln1\.w.*are trained"):
        lean.load_and_process_state_dict(dict(weights))
    assert changed(before, lean) == []
    for model in (stock, lean):
        _reset_norms_and_biases(model)
        model.load_and_process_state_dict(dict(weights))
    apart = differences(stock, lean)
    assert apart == []


@torch.no_grad()
def _reset_norms_and_biases(model: HookedTransformer) -> None:
    for name, parameter in model.named_parameters():
        if "W_" not in name:
            parameter.fill_(1 if name.endswith(".w") else 0)


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
def test_norms_are_folded_on_both_sides_or_on_neither(case_id: str, zoo: Any) -> None:
    _, raw = raw_pair(case_id, zoo)
    processed = lean_model(zoo(case_id))
    wanted, before, folded = log_probs(raw, case_id), values(raw), values(processed)
    with pytest.raises(MissingWeightsError, match="norms are folded away"):
        raw.load_and_process_state_dict(dict(folded))
    with pytest.raises(MissingWeightsError, match=r"no place for .*fold_ln=True"):
        processed.load_and_process_state_dict(dict(before), fold_ln=False)
    assert changed(before, raw) == []
    assert changed(folded, processed) == []
    processed.load_and_process_state_dict(dict(before))
    assert (log_probs(processed, case_id) - wanted).abs().max() < 1e-4


def test_the_norm_inside_an_mlp_is_folded_or_refused(zoo: Any) -> None:
    """SoLU's MLP has a norm of its own, which is lost as any other where it is not folded."""
    _, raw = raw_pair("solu", zoo)
    _reset_norms_and_biases(raw)
    raw.blocks[0].mlp.ln.w.data += 1
    processed = lean_model(zoo("solu"))
    before = values(processed)
    with pytest.raises(MissingWeightsError, match=r"no place for blocks\.0\.mlp\.ln\.w:"):
        processed.load_and_process_state_dict(values(raw), fold_ln=False)
    assert changed(before, processed) == []


def test_tables_of_another_length_are_left_out(zoo: Any) -> None:
    """Rotary tables grow with long prompts; other versions have masks of other shapes."""
    _, lean = raw_pair("llama-gqa", zoo)
    weights = values(lean)
    lean.load_and_process_state_dict(dict(weights))
    wanted, tables = log_probs(lean, "llama-gqa"), dict(lean.named_buffers())
    other = {**weights, "blocks.0.attn.mask": torch.ones(3, 3, dtype=torch.bool)}
    for name in ("blocks.0.attn.rotary_sin", "blocks.1.attn.rotary_cos"):
        other[name] = torch.zeros(weights[name].shape[0] * 2, weights[name].shape[1])
    other["blocks.1.attn.rotary_sin"] = weights["blocks.1.attn.rotary_sin"].bfloat16()
    lean.load_and_process_state_dict(other)
    assert torch.equal(log_probs(lean, "llama-gqa"), wanted)
    assert all(torch.equal(tables[name], buffer) for name, buffer in lean.named_buffers())
    assert sum("own table stays" in note for note in lean.load_report.notes) == 4


def test_a_models_own_state_dict_is_processed_in_place(zoo: Any) -> None:
    _, lean = raw_pair("gpt2", zoo)
    wanted = lean_model(zoo("gpt2"))
    lean.load_and_process_state_dict(lean.state_dict())
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(lean.get_parameter(name), parameter, rtol=0, atol=1e-6)


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda weights: weights.pop("blocks.1.attn.W_Q"), r"blocks\.1\.attn\.W_Q"),
    "misshapen": (
        lambda weights: weights.update({"embed.W_E": torch.zeros(3, 4)}),
        r"embed\.W_E.*3, 4",
    ),
    "several": (
        lambda weights: [weights.pop(f"blocks.{layer}.mlp.W_in") for layer in (0, 1)],
        r"blocks\.0\.mlp\.W_in.*blocks\.1\.mlp\.W_in",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_a_bad_state_dict_changes_nothing(
    spoil: Callable[[dict[str, Any]], Any], message: str, zoo: Any
) -> None:
    _, lean = raw_pair("gpt2", zoo)
    before, report, wanted = values(lean), lean.load_report, log_probs(lean, "gpt2")
    weights = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    spoil(weights)
    with pytest.raises(MissingWeightsError, match=f"(?s){message}"):
        lean.load_and_process_state_dict(weights)
    assert changed(before, lean) == []
    assert torch.equal(log_probs(lean, "gpt2"), wanted)
    assert lean.load_report == report
    lean.process_weights_()  # and it still can be processed
    assert lean.load_report.processing["fold_ln"] == "done"


def test_a_step_that_rotary_models_forbid_changes_nothing(zoo: Any) -> None:
    _, lean = raw_pair("llama-gqa", zoo)
    before, wanted = values(lean), log_probs(lean, "llama-gqa")
    with pytest.raises(LeanLoadError, match="rotary"):
        lean.process_weights_(refactor_factored_attn_matrices=True)
    assert changed(before, lean) == []
    assert torch.equal(log_probs(lean, "llama-gqa"), wanted)


def test_nan_in_a_state_dict_is_noted(zoo: Any) -> None:
    _, lean = raw_pair("gpt2", zoo)
    weights = values(lean)
    weights["blocks.0.mlp.W_in"][0, 0] = float("nan")
    lean.load_and_process_state_dict(weights)
    (note,) = [note for note in lean.load_report.notes if "NaN" in note]
    assert "blocks.0.mlp.W_in" in note
    assert "IGNORE" not in note  # a buffer that is minus infinity by design
