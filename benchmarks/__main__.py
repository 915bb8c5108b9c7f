"""`python -m benchmarks`: measure, print the tables, write the JSON, fail when a bound fails."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import bounds, bridge, cases, environment, formats, quantized, scaling, table
from benchmarks.imports import measure_import
from benchmarks.measure import Case, Measurement
from benchmarks.models import SHAPES, make_checkpoint
from benchmarks.predictions import with_predictions
from tl_fastload.cli.console import end_on_sigterm
from tl_fastload.ground import compat

_STAGES = ("load", "forward", "quantized", "import")
_BRIDGE_STAGES = ("bridge", "bridge-forward")
_FORMATS_STAGE = "formats"
_SCALING_STAGE = "scaling"
_ALL_STAGES = (*_STAGES, *_BRIDGE_STAGES, _FORMATS_STAGE, _SCALING_STAGE)
_BOUNDED = tuple(shape.name for shape in SHAPES.values() if shape.bounded)
_TINY = tuple(name for name in SHAPES if name.startswith("tiny-"))
_REPEATS = 3
_RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 when a bound failed or a measurement broke down."""
    options = _parser().parse_args(arguments)
    load, forward = "load" in options.only, "forward" in options.only
    has_quantized = "quantized" in options.only
    errors = Console(stderr=True)
    machine = environment.machine()
    planned: list[Case] = []
    if load or forward:
        planned = cases.all_cases(
            options.models, options.dtypes, load=load, forward=forward, with_stock=options.stock
        )
    if load and not cases.has_peft():
        errors.print("Loads with an adapter are left out: peft is not installed.")
    if has_quantized:
        with_stock = options.stock and not forward  # which measures stock in bfloat16 already
        planned += quantized.all_cases(options.models, with_stock=with_stock)
    bridged = not set(options.only).isdisjoint(_BRIDGE_STAGES)
    if bridged:
        forward_too = "bridge-forward" in options.only
        planned += bridge.all_cases(
            options.models, options.dtypes, forward=forward_too, with_stock=options.stock
        )
    of_formats = formats.all_cases() if _FORMATS_STAGE in options.only else []
    if planned or of_formats:
        for model in dict.fromkeys(case.model for case in (*planned, *of_formats)):
            errors.print(f"checkpoint {model}: {make_checkpoint(model, options.cache)}")
    imported = measure_import() if "import" in options.only else None
    announce = _announcer(errors)
    results = cases.run_all(planned, options.repeats or _REPEATS, options.cache, announce)
    repeats = options.repeats or formats.REPEATS
    results |= cases.run_all(of_formats, repeats, options.cache, announce)
    planned += of_formats
    if load:
        results = with_predictions(results, planned, options.cache)

    checks = bounds.checks(results, options.models, load=load, forward=forward)
    if has_quantized:
        checks += quantized.checks(results, options.models)
    if bridged:
        checks += bridge.checks(results, options.models)
    if _FORMATS_STAGE in options.only:
        checks += formats.checks(results, options.cache)
    if _SCALING_STAGE in options.only:
        grown = scaling.measure()
        scaling.show(Console(), grown)
        checks += scaling.checks(grown)
    if imported is not None:
        checks.append(bounds.import_check(None if imported.error else imported.median_seconds))
    table.show(Console(), results, planned, checks, imported, machine)
    complete = load and forward and has_quantized and imported is not None and options.stock
    complete = complete and tuple(options.models) == _BOUNDED
    complete = complete and tuple(options.dtypes) == cases.DTYPES
    found = table.report(results, planned, checks, imported, machine)
    _write(found, options.json, complete, errors)
    return _exit_status(checks, [*results.values(), *([imported] if imported else [])])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only",
        type=_choices("stage", {stage: (stage,) for stage in _ALL_STAGES}),
        default=_STAGES if compat.TRANSFORMER_LENS.major < 4 else (*_BRIDGE_STAGES, "import"),
        metavar="STAGES",
        help=f"any of {','.join(_STAGES)}; {' and '.join(_BRIDGE_STAGES)} (loads, and forward "
        f"passes beside them) are what TransformerLens 4 can, {_FORMATS_STAGE} (of a model of its "
        f"own) what is only read; {_SCALING_STAGE} how cost grows with the number of layers",
    )
    parser.add_argument(
        "--models",
        type=_choices("model", {name: (name,) for name in SHAPES} | {"tiny": _TINY}),
        default=_BOUNDED,
        help=f"any of {','.join(SHAPES)}, or tiny (to try this out: no bounds apply)",
    )
    parser.add_argument(
        "--dtypes",
        type=_choices("dtype", {dtype: (dtype,) for dtype in cases.DTYPES}),
        default=cases.DTYPES,
        help="any of " + ",".join(cases.DTYPES) + " (forward passes in bfloat16 take an hour on "
        "CPUs without AVX-512 BF16)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        help=f"processes per case (default {_REPEATS}; of formats {formats.REPEATS})",
    )
    parser.add_argument(
        "--no-stock",
        dest="stock",
        action="store_false",
        help="do not measure TransformerLens' own loader (slow, and up to four times the memory)",
    )
    parser.add_argument(
        "--json", type=Path, help="write here (default for a complete run: benchmarks/results/)"
    )
    parser.add_argument("--cache", type=Path, help="folder of the benchmark checkpoints")
    return parser


class _choices:  # noqa: N801 - used as a function by argparse, which prints its name
    """Parses a comma-separated list of names, some of which stand for several."""

    def __init__(self, what: str, meaning: dict[str, tuple[str, ...]]) -> None:
        self.__name__ = what
        self._meaning = meaning

    def __call__(self, text: str) -> tuple[str, ...]:
        names = text.split(",")
        for name in names:
            if name not in self._meaning:
                known = ", ".join(self._meaning)
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {known}")
        return tuple(dict.fromkeys(one for name in names for one in self._meaning[name]))


def _announcer(console: Console) -> cases.Announce:
    def announce(number: int, total: int, case: Case, measurement: Measurement) -> None:
        what = measurement.error or f"{measurement.median_seconds:.2f} s"
        console.print(f"[{number}/{total}] {case.name}: {what}", markup=False, highlight=False)

    return announce


def _write(found: dict[str, object], path: Path | None, complete: bool, console: Console) -> None:
    if path is not None:
        paths = [path]
    elif complete:
        day = datetime.date.today().isoformat()
        paths = [_RESULTS / f"{day}-{environment.label()}.json", _RESULTS / "latest.json"]
    else:
        console.print("Not a complete run: no JSON written (--json PATH writes it).")
        return
    table.write_json(found, paths)
    console.print("Written: " + ", ".join(str(path) for path in paths))


def _exit_status(checks: Sequence[bounds.Check], measured: Sequence[Measurement]) -> int:
    """A case that needs more memory than there is does not fail; one that broke down does."""
    broken = any(m.error is not None and m.error.startswith("failed") for m in measured)
    return int(broken or any(check.passed is False for check in checks))


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
