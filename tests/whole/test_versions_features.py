"""What is built on loading, with every version: copies, plans, weights, commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tl_fastload
from tests.support import environments, reference
from tests.support.comparison import changed, differences, lean_model, values
from tl_fastload import cli
from tl_fastload.errors import LeanLoadError
from tl_fastload.ground import compat

pytestmark = pytest.mark.parity

PROCESSING: dict[str, dict[str, bool]] = {"processed": {}, "unprocessed": reference.NO_PROCESSING}
every_case = pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "mixtral", "solu"])


@pytest.mark.parametrize("processing", PROCESSING)
@every_case
def test_a_processed_copy_is_the_model(
    case_id: str, processing: str, zoo: Any, tmp_path: Path
) -> None:
    flags = PROCESSING[processing]
    model = lean_model(zoo(case_id), **flags)
    model.save_lean(tmp_path / "copy", progress=False)
    again = lean_model(tmp_path / "copy", **flags)
    assert differences(model, again) == []
    report = again.load_report
    assert report.strategy == ("assign" if compat.can_assign() else "copy")
    assert report.mapped_bytes == (report.parameter_bytes if compat.can_assign() else 0)


@every_case
def test_the_cache_keeps_it(case_id: str, zoo: Any, tmp_path: Path) -> None:
    first, second = (lean_model(zoo(case_id), cache=tmp_path) for _ in range(2))
    assert second.load_report.reason == "a processed copy"
    assert differences(first, second) == []


@every_case
def test_weights_into_a_live_model(case_id: str, zoo: Any, tmp_path: Path) -> None:
    """By TransformerLens' names, and by Hugging Face's from a folder, unprocessed."""
    model = lean_model(zoo(case_id), **reference.NO_PROCESSING)
    wanted = values(model)
    for source in (dict(wanted), *([zoo(case_id)] if case_id != "solu" else [])):
        for parameter in model.parameters():
            parameter.data.zero_()
        tl_fastload.load_weights_(model, source)
        assert changed(wanted, model) == []


@every_case
def test_a_plan_is_what_is_loaded(case_id: str, zoo: Any) -> None:
    for flags in PROCESSING.values():
        report = lean_model(zoo(case_id), **flags).load_report
        plan = tl_fastload.plan(zoo(case_id), device="cpu", **flags)
        parameters = plan.total_bytes - plan.parameter_bytes["buffers"]
        assert (parameters, plan.mapped_bytes) == (report.parameter_bytes, report.mapped_bytes)
        assert plan.strategy == report.strategy
        assert plan.stock_peak_anonymous_bytes > report.parameter_bytes


@pytest.mark.parametrize("command", ["plan", "load", "save"])
def test_the_command(command: str, zoo: Any, tmp_path: Path) -> None:
    target = [str(tmp_path / "copy")] if command == "save" else []
    folder = zoo("llama-gqa", tokenizer=True)
    done = CliRunner().invoke(cli.app, [command, str(folder), *target, "--device", "cpu"])
    assert done.exit_code == 0, (done.output, done.exception)
    if command == "save":
        assert differences(lean_model(folder), lean_model(*target)) == []


def test_the_doctor_knows_what_would_run() -> None:
    done = CliRunner().invoke(cli.app, ["doctor", "--json", "-"])
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.output)
    assert found["strategy"].startswith("assign" if compat.can_assign() else "copy")
    advised = any("holds no quantized weights" in fix for fix in found["fixes"])
    assert advised == (not compat.can_assign())


def test_an_adapter_without_its_library(zoo: Any, tmp_path: Path) -> None:
    """One error that says what to install; with it, one that says what is missing."""
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    is_there = environments.installed("peft") != "0"
    wanted = "adapter_model" if is_there else 'pip install "peft>=0.11"'
    with pytest.raises(LeanLoadError, match=wanted):
        lean_model(zoo("gpt2"), adapter=tmp_path)
