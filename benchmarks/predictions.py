"""What `tl_fastload.plan` says of each case, to be held against what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.measure import Case
from benchmarks.roads import lean_arguments
from tl_fastload.cli.bench.loads import import_architecture, torch_dtype
from tl_fastload.cli.bench.process import Measurement, measure
from tl_fastload.request.steps import STEPS


def prepare(case: dict[str, Any], folder: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """For `run_action`: plan a case; the plan's predictions for lean and for stock."""
    from tl_fastload import plan

    wanted = Case(**case)
    import_architecture(Path(folder))
    arguments = lean_arguments(wanted, Path(folder))
    steps = {} if wanted.processed else dict.fromkeys(STEPS, False)
    return lambda: plan(
        folder, dtype=torch_dtype(wanted.dtype), device="cpu", **arguments, **steps
    ), _describe


def _describe(plan: Any) -> dict[str, Any]:
    return {
        "seconds": plan.seconds,
        "lean": [plan.peak_anonymous_bytes, plan.peak_host_bytes],
        "stock": [plan.stock_peak_anonymous_bytes, plan.stock_peak_host_bytes],
    }


def with_predictions(
    results: Mapping[str, Measurement], planned: Iterable[Case], cache: Path | None
) -> dict[str, Measurement]:
    """The measurements with a fact "predicted" for each single load by lean or stock:
    `anonymous_bytes`, `resident_bytes`, and the `seconds` that planning took.
    """
    made = dict(results)
    known: dict[Case, dict[str, Any] | None] = {}
    for case in planned:
        found = results[case.name]
        if case.road not in ("lean", "stock") or case.loads > 1 or found.error is not None:
            continue
        question = replace(case, road="lean", forward_tokens=())
        if question not in known:
            known[question] = _predict(question, cache)
        predicted = known[question]
        if predicted is not None:
            anonymous, resident = predicted[case.road]
            facts = {
                "anonymous_bytes": anonymous,
                "resident_bytes": resident,
                "seconds": predicted["seconds"],
            }
            made[case.name] = replace(found, facts={**found.facts, "predicted": facts})
    return made


def _predict(case: Case, cache: Path | None) -> dict[str, Any] | None:
    folder = models.make_checkpoint(case.model, cache).resolve()
    environment = {"HF_HUB_OFFLINE": "1"}
    arguments = {"case": asdict(case), "folder": str(folder)}
    found = measure("benchmarks.predictions:prepare", arguments, case.name, environment)
    return None if found.error is not None else found.facts
