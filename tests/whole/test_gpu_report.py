"""The report about a device, as far as the CPU can try it: what it says is what there was."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.gpu_report import __main__ as report
from benchmarks.gpu_report import parity, ring, stand_ins
from benchmarks.gpu_report import sections as sections_module
from benchmarks.gpu_report.checkpoints import checkpoint
from benchmarks.gpu_report.sections import Run, errors
from benchmarks.gpu_report.table import markdown
from tl_fastload.cli.bench.synthetic import weights_file

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return Run(CPU, tmp_path, budget_seconds=1000.0, is_dry=True)


def fail() -> None:
    raise RuntimeError("no such kernel")


def test_a_section_that_fails_or_finds_no_time_is_noted(tmp_path: Path) -> None:
    run = Run(CPU, tmp_path, budget_seconds=10.0, is_dry=False)
    found: dict[str, Any] = {}
    run.attempt(found, "broken", fail)
    run.attempt(found, "long", fail, wants_seconds=60.0)
    run.attempt(found, "whole", lambda: {"steps": {"inner": {"error": "deep"}}})
    assert "skipped" in found["long"]
    assert list(errors(found)) == [
        "broken: RuntimeError: no such kernel",
        "whole/steps/inner: deep",
    ]


def test_what_a_process_does_not_live_to_measure_the_next_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_roomy", lambda is_dry: str(tmp_path))
    monkeypatch.setattr(report, "_environment", lambda run: {})
    monkeypatch.setattr(report, "os", SimpleNamespace(environ={}))
    asked = []

    def lose(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def crash() -> None:
        raise KeyboardInterrupt  # which nothing in a section catches

    def sections(run: Run, found: Any) -> list[Any]:
        def say(name: str) -> Any:
            asked.append(name)
            if name == "lost":
                monkeypatch.setattr(sections_module, "synchronize", lose)
            elif name == "crash":
                crash()
            return {"seconds": 1.0}

        return [(name, partial(say, name), 0.0) for name in ("first", "lost", "crash", "last")]

    def process(command: list[str], **options: Any) -> Any:
        monkeypatch.setattr(sections_module, "synchronize", lambda device: None)
        with contextlib.suppress(KeyboardInterrupt):
            return SimpleNamespace(returncode=report.main(command[3:]))
        return SimpleNamespace(returncode=-11)

    monkeypatch.setattr(report, "_sections", sections)
    monkeypatch.setattr(subprocess, "run", process)
    assert report.main(["--dry-run", "--out", str(tmp_path / "out")]) == 1
    assert asked == ["first", "lost", "crash", "last"]
    found = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert found["first"] == found["last"] == {"seconds": 1.0}
    assert [error.partition(":")[0] for error in errors(found)] == ["lost", "crash"]


def test_a_process_that_never_begins_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(
        subprocess, "run", lambda c, **k: started.append(c) or SimpleNamespace(returncode=1)
    )
    assert report.main(["--dry-run"]) == 1
    assert len(started) == 1


def test_a_model_is_measured_in_multiples_of_its_parameters(run: Run) -> None:
    found, model = run.measured(lambda: torch.nn.Linear(1 << 20, 16, bias=False))
    assert found["parameter_bytes"] == 64 << 20
    assert isinstance(model, torch.nn.Linear)
    assert found["peak_anonymous_x"] == pytest.approx(1.0, rel=0.1)
    assert found["peak_device_bytes"] is None  # not a CUDA device


def test_the_ring_brings_the_bytes_of_the_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights_file(checkpoint(run, "1b"))
    monkeypatch.setattr(ring, "SLOT_BYTES", 4096)  # many jobs for few slots
    expected = load_file(path)
    for threads in (1, 4):
        found = ring.load(path, CPU, ring.make_slots(2, CPU), threads)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_a_reader_of_the_ring_that_fails_is_heard(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = weights_file(checkpoint(run, "1b"))
    monkeypatch.setattr(ring.os, "preadv", lambda *_: 0)
    with pytest.raises(EOFError, match="shorter"):
        ring.load(path, CPU, ring.make_slots(2, CPU), 2)


def test_parity_sees_another_number(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "ARCHITECTURES", {"gpt2": parity.ARCHITECTURES["gpt2"]})
    found = parity.measure(run)
    assert list(errors(found)) == []
    assert found["gpt2 float32"]["log_probs_to_transformers"] < 1e-4
    loads = []

    def other(lean_load: Any, *arguments: Any, **more: Any) -> Any:
        def load() -> Any:
            model = lean_load(*arguments, **more)()
            if not loads:  # the first is the one on the device
                next(model.parameters()).data[0] += 1
            loads.append(model)
            return model

        return load

    monkeypatch.setattr(parity, "lean_load", partial(other, parity.lean_load))
    assert [error.partition(":")[0] for error in errors(parity.measure(run))] == ["gpt2 float32"]


def test_the_table_has_every_finding() -> None:
    found = {
        "bus": {"pinned_to_device": 25.123},
        "load": {
            "file_bytes": 10,
            "lean": {"seconds": 1.5, "x_bus": 1.3, "peak_device_x": 1.05},
            "stock": {"error": "out | of memory"},
        },
    }
    lines = markdown("A card", found).splitlines()
    assert "- pinned_to_device: 25.12" in lines
    assert "| lean | 1.5 | 1.3 | 1.05 |" in lines
    assert "- stock: error out / of memory" in lines
    json.dumps(found)


def test_what_stands_in_for_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "datasets":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(stand_ins.importlib.util, "find_spec", lambda name: None)
    assert stand_ins.stand_in_for_datasets()
    from datasets.arrow_dataset import Dataset

    assert Dataset.__module__ == stand_ins.__name__
