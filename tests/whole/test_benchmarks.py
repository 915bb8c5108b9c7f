"""The benchmark measures what it says: memory and time that are known beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from rich.console import Console
from safetensors import safe_open

from benchmarks import bounds, cases, models, quantized, scaling
from benchmarks.__main__ import main
from benchmarks.floor import load_floor
from benchmarks.measure import Case, run_case
from benchmarks.quantized_checkpoints import make_quantized_checkpoint
from benchmarks.quantized_roads import stored_tensors
from benchmarks.roads import prepare, viewed_bytes
from tests.support.measured_actions import MB, Prepared, allocate, fail, read_mapped, report_threads
from tl_fastload import LeanHookedTransformer
from tl_fastload.cli.bench import process
from tl_fastload.cli.bench.process import Measurement, combine
from tl_fastload.cli.bench.synthetic import entry_shapes, weights_file


def measure(function: Callable[..., Prepared], **arguments: Any) -> Measurement:
    target = f"tests.support.measured_actions:{function.__name__}"
    return process.measure(target, arguments, timeout_seconds=900)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def test_known_allocation_is_measured_above_the_baseline() -> None:
    found = measure(allocate, kept_mb=200, seconds=0.2)
    for measured in (
        found.peak_anonymous_bytes,
        found.peak_resident_bytes,
        found.after_anonymous_bytes,
        found.used_resident_bytes,
    ):
        assert measured == pytest.approx(200 * MB, rel=0.05)
    assert found.peak_file_bytes < 10 * MB
    assert found.median_seconds >= 0.2
    assert found.samples > 0


def test_peak_that_is_gone_at_the_end_is_seen() -> None:
    found = measure(allocate, kept_mb=40, briefly_mb=200)
    assert found.peak_anonymous_bytes == pytest.approx(200 * MB, rel=0.1)
    assert found.after_anonymous_bytes == pytest.approx(40 * MB, rel=0.1)
    if found.peak_is_exact:  # the kernel's own mark, which misses nothing
        assert found.peak_resident_bytes == pytest.approx(200 * MB, rel=0.05)


def test_mapped_file_is_resident_and_not_anonymous(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(b"x" * (100 * MB))
    found = measure(read_mapped, path=str(path))
    assert found.peak_anonymous_bytes < 10 * MB
    assert found.peak_file_bytes == pytest.approx(100 * MB, rel=0.1)
    assert found.peak_resident_bytes == pytest.approx(100 * MB, rel=0.15)


def test_failure_carries_the_message_of_the_process() -> None:
    found = measure(fail, message="out of cheese")
    assert found.error is not None
    assert found.error.startswith("failed: ValueError: out of cheese")


def test_measured_process_uses_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    free = measure(report_threads).facts["threads"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert measure(report_threads).facts["threads"] == free


def test_shared_storage_counts_once() -> None:
    whole = torch.zeros(100, dtype=torch.float32)
    other = torch.zeros(10, dtype=torch.bfloat16)
    assert viewed_bytes([whole, whole.view(10, 10).T, whole[:50], other]) == 420
    assert viewed_bytes([whole[:50], whole[40:60]]) == 240
    assert viewed_bytes([other.expand(7, 10)]) == 20
    assert viewed_bytes([]) == 0


def test_gaps_of_a_view_do_not_count() -> None:
    fused = torch.zeros(6, 30)
    parts = [part.view(6, 2, 5).permute(1, 0, 2) for part in fused.chunk(3, dim=1)]
    assert [viewed_bytes([part]) for part in parts] == [240, 240, 240]
    assert viewed_bytes(parts) == viewed_bytes([fused.T]) == 720
    assert viewed_bytes([fused[:, ::3], fused[:, 1:2]]) == 264


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_checkpoint_is_a_valid_file_made_once(name: str, cache: Path) -> None:
    folder = models.make_checkpoint(name, cache)
    path = weights_file(folder)
    written = path.stat().st_mtime_ns
    assert models.make_checkpoint(name, cache) == folder
    assert path.stat().st_mtime_ns == written

    shape = models.SHAPES[name]
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
    assert {key: tuple(t.shape) for key, t in tensors.items()} == entry_shapes(shape)
    assert {t.dtype for t in tensors.values()} == {getattr(torch, shape.file_dtype)}
    assert sum(t.nbytes for t in tensors.values()) == shape.file_bytes()
    norms = [t for key, t in tensors.items() if t.dim() == 1 and key.endswith("weight")]
    assert all(0.8 < t.float().mean() < 1.2 and t.float().std() > 0.01 for t in norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_floor_reads_the_right_values(name: str, dtype: torch.dtype, cache: Path) -> None:
    path = weights_file(models.make_checkpoint(name, cache))
    tied = models.SHAPES[name].tied_key
    tensors = load_floor(path, dtype, twice=tied)
    with safe_open(path, framework="pt") as file:
        expected = [file.get_tensor(key) for key in entry_shapes(models.SHAPES[name])]
    if tied is not None:  # the first entry, read a second time into memory of its own
        assert tensors[0].data_ptr() != tensors[1].data_ptr()
        expected.insert(0, expected[0])
    assert len(tensors) == len(expected)
    assert all(torch.equal(t, e.to(dtype)) for t, e in zip(tensors, expected, strict=True))


def test_stock_and_transformers_load_the_same_function(cache: Path) -> None:
    """Stock, under its official name and offline, is really given the benchmark's weights."""
    name = "tiny-llama"
    stock = run_case(Case(name, "stock", "float32", forward_tokens=(1,)), cache)
    assert stock.error is None
    # Its numbers are asked for, not its memory: no process of its own.
    case = Case(name, "transformers", "float32", forward_tokens=(1,))
    act, describe = prepare(asdict(case), str(models.make_checkpoint(name, cache)))
    reference = Measurement("transformers", facts=describe(act()))
    difference = bounds.log_prob_difference(stock, reference)
    assert difference is not None
    assert difference < 1e-4
    assert stock.parameter_bytes > models.SHAPES[name].file_bytes()
    assert stock.facts["forward_seconds"]["1"] > 0


def test_case_that_does_not_fit_is_not_started(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "available_host_bytes", lambda: 10 * MB)
    found = run_case(Case("tiny-gpt2", "floor", "float32"), cache)
    assert found.error is not None
    assert found.error.startswith("not measured: needs")


def measurement(seconds: float, peak: int = 0, **facts: Any) -> Measurement:
    facts = {"parameter_bytes": 100, "growth_bytes": 0, **facts}
    return Measurement(
        "", (seconds,), peak_anonymous_bytes=peak, peak_resident_bytes=peak, facts=facts
    )


def test_repeats_give_the_median_time_and_the_largest_memory() -> None:
    found = combine([measurement(3.0, 5), measurement(1.0, 7), measurement(2.0, 6)])
    assert found.median_seconds == 2.0
    assert found.peak_anonymous_bytes == 7
    broken = Measurement("", error="failed: no")
    assert combine([measurement(1.0), broken]).error == "failed: no"


def verdicts(lean: Measurement) -> dict[str, bool | None]:
    model, dtype = "llama-1.1b", "float32"
    results = {
        cases.floor(model, dtype).name: measurement(1.0),
        cases.stock(model, dtype).name: measurement(20.0),
        cases.lean(model, dtype).name: lean,
    }
    found = bounds.checks(results, [model], load=True, forward=False)
    subject = cases.lean(model, dtype).name
    return {check.promise: check.passed for check in found if check.subject == subject}


def test_bounds_pass_and_fail_where_they_should() -> None:
    good = verdicts(measurement(2.9, peak=105))
    assert set(good.values()) == {True}
    bad = verdicts(measurement(4.1, peak=116))
    assert set(bad.values()) == {False}
    missing = verdicts(Measurement("", error="not measured: needs more"))
    assert set(missing.values()) == {None}
    assert good.keys() == bad.keys() == missing.keys()


def test_every_bound_is_about_a_case_that_is_measured() -> None:
    names = [name for name, shape in models.SHAPES.items() if shape.bounded]
    planned = cases.all_cases(names)
    results = {
        case.name: measurement(
            1.0,
            largest_parameter_bytes=1,
            forward_seconds=dict.fromkeys(map(str, case.forward_tokens), 1.0),
            log_probs=[0.0],
        )
        for case in planned
    }
    assert len(results) == len(planned)
    found = bounds.checks(results, names, load=True, forward=True)
    assert {check.subject for check in found} <= results.keys()
    assert all(check.passed is not None for check in found)
    assert len({(check.subject, check.promise) for check in found}) == len(found) > 40


@pytest.mark.parametrize("assigns", [True, False])
def test_older_versions_are_bound_in_memory(assigns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that they cannot do is measured, and no speed against another stock is promised."""
    monkeypatch.setattr("tl_fastload.ground.compat.can_assign", lambda: assigns)
    monkeypatch.setattr("tl_fastload.ground.compat.TRANSFORMER_LENS", Version("2.18"))
    monkeypatch.setattr(cases, "has_peft", lambda: False)
    models_ = ["gpt2-medium", "llama-1.1b"]
    planned = cases.all_cases(models_, forward=False)
    assert not any(case.adapter for case in planned)
    assert any(case.quantize for case in planned) == assigns
    results = {case.name: measurement(1.0, largest_parameter_bytes=1) for case in planned}
    found = bounds.checks(results, models_, load=True, forward=False)
    assert not any("faster" in check.promise for check in found)
    limits = {c.subject: c.limit for c in found if c.promise == "peak anonymous memory"}
    assert limits[cases.lean("llama-1.1b", "float32").name] == (1.05 if assigns else 1.15)
    assert limits[cases.lean("llama-1.1b", "bfloat16", False).name] == (0.05 if assigns else 1.15)
    assert limits[cases.reload("llama-1.1b", "bfloat16").name] == (0.05 if assigns else 1.15)


def test_copy_that_cannot_be_made_fails_its_cases(cache: Path) -> None:
    found = run_case(cases.reload("tiny-gpt2", "float32", "3bit"), cache)
    assert found.error is not None
    assert found.error.startswith("failed: ")
    assert "3bit" in found.error


def quantized_results(peak: int, seconds: float, densified: float) -> dict[str, Measurement]:
    """Of every case, the lean ones as told; parameters are as large as the largest one."""
    results = {}
    whole = quantized.largest_parameter_bytes("llama-1.1b")
    for case in quantized.all_cases(["llama-1.1b"]):
        is_lean = case.road == "lean"
        times = dict.fromkeys(map(str, case.forward_tokens), seconds if is_lean else 1.0)
        held = measurement(1.0, forward_seconds=times, log_probs=[densified if is_lean else 0.0])
        held.facts["parameter_bytes"] = whole
        memory = dict.fromkeys(("peak_anonymous_bytes", "peak_resident_bytes"), peak * whole // 100)
        results[case.name] = replace(held, **memory) if is_lean else held
    return results


def test_quantized_bounds_pass_and_fail_where_they_should() -> None:
    def verdicts(*args: Any) -> set[bool | None]:
        found = quantized.checks(quantized_results(*args), ["llama-1.1b"])
        return {check.passed for check in found if "quantized model" not in check.promise}

    assert verdicts(205, 1.3, 0.1) == {True}  # a parameter in float32 is allowed for
    assert verdicts(206, 1.31, 0.3) == {False}
    checks = quantized.checks(quantized_results(205, 1.3, 0.1), ["llama-1.1b", "gpt2-medium"])
    assert all(check.passed for check in checks)
    assert len({(check.subject, check.promise) for check in checks}) == len(checks) > 15
    assert {check.passed for check in quantized.checks({}, ["llama-1.1b"])} == {None}
    assert quantized.checks({}, ["tiny-llama"]) == []
    assert quantized.all_cases(["gpt2-medium"]) == []


def test_quantized_table_has_a_row_for_each_load() -> None:
    planned = quantized.all_cases(["llama-1.1b"])
    results = quantized_results(200, 1.0, 0.0)
    made = quantized.table(results, [*cases.all_cases(["llama-1.1b"]), *planned])
    # A heading for each kind and one for stock, whose bfloat16 load is shown for comparison.
    assert made.row_count == len(planned) + 3 + 1


@pytest.mark.slow  # two processes that import everything
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_roads_load_the_same_function(kind: str, cache: Path) -> None:
    folder = make_quantized_checkpoint("tiny-llama", kind, cache)
    written = weights_file(folder).stat().st_mtime_ns
    assert make_quantized_checkpoint("tiny-llama", kind, cache) == folder
    assert weights_file(folder).stat().st_mtime_ns == written
    found = {
        case.road: run_case(replace(case, forward_tokens=(1,)), cache)
        for case in (
            quantized.lean("tiny-llama", kind, saved=True),
            quantized.exact_reference("tiny-llama", kind),
            quantized.densify("tiny-llama", kind),
        )
    }
    assert {m.error for m in found.values()} == {None}
    lean, densified = found.pop("lean"), found.pop("densify")
    (reference,) = found.values()
    for one in (lean, densified):
        difference = bounds.log_prob_difference(one, reference)
        assert difference is not None
        assert difference < 0.1
    # Zero biases, which a tiny model has many of, are all that TransformerLens adds.
    assert reference.parameter_bytes <= lean.parameter_bytes < 1.1 * reference.parameter_bytes


@pytest.mark.parametrize("kind", ["8bit", "nf4"])
def test_stored_bytes_are_those_of_the_report(kind: str, cache: Path) -> None:
    folder = models.make_checkpoint("tiny-llama", cache)
    model = LeanHookedTransformer.from_pretrained_lean(folder, quantize=kind, device="cpu")
    held = viewed_bytes(stored_tensors(model))
    assert held == model.load_report.parameter_bytes
    assert held < models.SHAPES["tiny-llama"].file_bytes()


def test_command_writes_the_figures(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dtype = "tiny-llama", "float32"
    few = [cases.floor(model, dtype), cases.lean(model, dtype)]
    monkeypatch.setattr(cases, "all_cases", lambda *_, **__: few)
    path = tmp_path / "found.json"
    arguments = ["--models", model, "--only", "load", "--repeats", "1"]
    assert main([*arguments, "--cache", str(cache), "--json", str(path)]) == 0
    text = path.read_text()
    found = json.loads(text)
    assert {"machine", "versions", "checks"} <= found.keys()
    floor, lean = found["measurements"]
    assert floor["facts"]["parameter_bytes"] == 2 * models.SHAPES[model].file_bytes()
    assert lean["facts"]["report"]["parameter_bytes"] == lean["facts"]["parameter_bytes"]
    assert str(Path.home()) not in text


def test_broken_measurement_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Measurement("import tl_fastload", error="failed: ImportError")
    monkeypatch.setattr("benchmarks.__main__.measure_import", lambda: broken)
    assert main(["--only", "import"]) == 1


def test_how_cost_grows(capsys: pytest.CaptureFixture[str]) -> None:
    found = scaling.measure((2, 4))
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found.values())
    scaling.show(Console(), found, (2, 4))
    assert "exponent" in capsys.readouterr().out
    assert scaling.exponent((10, 20), [1.0, 4.0]) == 2.0
    assert [check.passed for check in scaling.checks({"plan": [1.0, 2.1], "load": [1.0, 2.3]})] == [
        *(True, False)
    ]
