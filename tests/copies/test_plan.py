"""Plans of processed copies and of loads through the cache, against what the loads then report."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cli.test_cli import run
from tests.support.comparison import lean_model
from tl_fastload import NotEnoughMemory, cli, plan
from tl_fastload.embedded_model import embedded_model_path
from tl_fastload.errors import ArgumentError, CheckpointError
from tl_fastload.loading import load as sessions
from tl_fastload.planning import dry_run as drafts
from tl_fastload.planning import make
from tl_fastload.report import available
from tl_fastload.source.reader import FileMaps, FileReader

RAW = dict.fromkeys(
    ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(lean_model(embedded_model_path()).save_lean(tmp_path / "copy"))


def parameter_bytes(found: Any) -> int:
    return int(found.total_bytes - found.parameter_bytes["buffers"])


@pytest.mark.parametrize("arguments", [{}, {"quantize": "nf4"}, {"dtype": "bfloat16", **RAW}])
def test_sizes_are_those_of_the_loaded_copy(arguments: Any, zoo: Any, tmp_path: Path) -> None:
    folder = zoo("llama-gqa1-tied", hidden_size=192, intermediate_size=256)
    lean_model(folder, **arguments).save_lean(tmp_path / "copy")
    flags = {name: value for name, value in arguments.items() if name in RAW}
    found = plan(tmp_path / "copy", device="cpu", **flags)
    original = plan(folder, device="cpu", **arguments)
    model = lean_model(tmp_path / "copy", **flags)
    report = model.load_report
    assert parameter_bytes(found) == report.parameter_bytes
    assert found.mapped_bytes == report.mapped_bytes == report.parameter_bytes
    assert found.parameter_bytes == original.parameter_bytes
    assert found.dtype == report.dtype
    assert found.quantization == report.quantization
    assert found.source == report.source
    assert found.stock_peak_host_bytes is None
    read = plan(tmp_path / "copy", device="cpu", mmap=False, **flags)
    assert read.mapped_bytes == 0
    assert read.peak_anonymous_bytes - found.peak_anonymous_bytes == found.total_bytes


def test_nothing_but_headers_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(FileReader, "read", read)
    monkeypatch.setattr(FileMaps, "_storage", read)
    assert plan(copy, device="cpu").fits


@pytest.mark.parametrize(
    "arguments", [{"dtype": "bfloat16"}, {"fold_ln": False}, {"quantize": "8bit"}, {"n_ctx": 3}]
)
def test_arguments_are_refused_as_by_the_load(arguments: Any, copy: Path) -> None:
    for call in (plan, lean_model):
        with pytest.raises(ArgumentError, match=r"asked for"):
            call(copy, **arguments)


def test_a_damaged_copy_is_refused(copy: Path) -> None:
    next(copy.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(CheckpointError, match="cut off"):
        plan(copy)


def test_a_copy_that_does_not_fit(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (drafts, available):
        monkeypatch.setattr(module, "available_bytes", lambda device: 11 << 20)
    found = plan(copy, device="cpu", mmap=False)
    assert not found.fits
    assert [choice.arguments for choice in found.advice] == [{"mmap": "auto", "strategy": "auto"}]
    assert plan(copy, device="cpu", **found.advice[0].arguments).fits
    assert pickle.loads(pickle.dumps(found)).advice == found.advice
    monkeypatch.setattr(available, "available_bytes", lambda device: 1000)
    with pytest.raises(NotEnoughMemory, match=r"would fit:\n  mmap='auto'"):
        lean_model(copy, mmap=False)


def test_advice_is_found_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "available_bytes", lambda device: 1000)
    asked: list[Any] = []
    monkeypatch.setattr(make.advice, "choices", lambda *call: asked.append(call) or [])
    found = plan(embedded_model_path(), device="cpu")
    assert not found.fits
    assert asked == []
    assert found.advice == found.advice == ()
    assert len(asked) == 1


def test_small_models_are_not_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding out what they need took as long as a part of loading them."""
    rehearsed: list[Any] = []
    real = sessions.forecast
    monkeypatch.setattr(sessions, "forecast", lambda *a: rehearsed.append(a) or real(*a))
    lean_model(embedded_model_path())
    assert rehearsed == []
    elements = sum(p.numel() for p in lean_model(embedded_model_path()).parameters())
    monkeypatch.setattr(available, "available_bytes", lambda device: 63 * elements)
    lean_model(embedded_model_path())
    assert len(rehearsed) == 1


def test_a_miss_counts_the_entry_and_a_hit_is_mapped(zoo: Any, tmp_path: Path) -> None:
    folder, home = zoo("llama-gqa", hidden_size=192, intermediate_size=256), tmp_path / "cache"
    arguments: dict[str, Any] = {"dtype": "bfloat16", "cache": home}
    missed = plan(folder, device="cpu", **arguments)
    assert not home.exists()
    assert missed.disk_bytes == missed.cache_bytes > 0
    assert missed.available_disk_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert "for the cache" in str(missed)
    assert plan(folder, device="cpu", dtype="bfloat16").disk_bytes == 0
    model = lean_model(folder, **arguments)
    (entry,) = home.iterdir()
    written = sum(path.stat().st_size for path in entry.glob("*.safetensors"))
    assert missed.cache_bytes == pytest.approx(written, rel=0.05)
    hit = plan(folder, device="cpu", **arguments)
    assert (hit.disk_bytes, hit.cache_bytes) == (0, 0)
    assert hit.mapped_bytes == parameter_bytes(hit) == model.load_report.parameter_bytes
    assert plan(folder, device="cpu", cache=home).cache_bytes > 0  # in float32: another entry


def test_an_entry_without_room_fails_no_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = plan(embedded_model_path(), device="cpu", cache=tmp_path)
    assert found.fits
    assert "not kept" in found.notes[-1]


def test_on_the_command_line(copy: Path) -> None:
    assert "processed copies" in run("plan", copy, "--device", "cpu").stdout
    done = CliRunner().invoke(cli.app, ["plan", str(copy), "--json", "-", "--device", "cpu"])
    values = json.loads(done.stdout)
    assert values["mapped_bytes"] == plan(copy, device="cpu").mapped_bytes
    assert "advise" not in values
    run("plan", copy, "--dtype", "bfloat16", code=2)
