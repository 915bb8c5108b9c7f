"""Formats that are only read: memory of a load, and forward passes beside dense float32 ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from benchmarks import bounds, cases, rows
from benchmarks.bounds import Check, Results
from benchmarks.measure import Case, Measurement
from benchmarks.models import SHAPES
from benchmarks.quantized_checkpoints import PACKED, make_quantized_checkpoint, weight_files

MODEL = "llama-0.1b"
"""Two layers with the matrices of the 1.1B shape."""
REPEATS = 1
"""Of each case: memory hardly changes, and times are the shortest of several passes."""
_DTYPE = "float32"
_RUN_BY_TRANSFORMERS = ("fp8",)  # without further packages
_FORWARD = {64: 3.0}
_PARAMETER_BYTES = 1.03
_PEAK_BYTES = 0.10


def lean(kind: str, processed: bool = True) -> Case:
    """A load of the checkpoint in a format; kind "" for the dense one. Forward passes are timed of
    processed models, which take a little longer.
    """
    tokens = cases.FORWARD_TOKENS if processed else ()
    return Case(
        *(MODEL, "lean", _DTYPE, processed), kind=kind, saved=bool(kind), forward_tokens=tokens
    )


def transformers(kind: str) -> Case:
    return replace(lean(kind), road="transformers")


def all_cases() -> list[Case]:
    """The dense load, then those of each format."""
    found = [lean("")]
    for kind in PACKED:
        found += [lean(kind), lean(kind, processed=False)]
        if kind in _RUN_BY_TRANSFORMERS:
            found.append(transformers(kind))
    return found


def of(planned: Sequence[Case]) -> list[Case]:
    return [case for case in planned if case.model == MODEL]


def checks(results: Results, cache: Path | None) -> list[Check]:
    """The promises: what is kept is the file, hardly more is needed, and products are not slow."""
    found = []
    for kind in PACKED:
        file_bytes = _file_bytes(kind, cache)
        raw, processed = (bounds.good(results, lean(kind, flag)) for flag in (False, True))
        value = raw.parameter_bytes / file_bytes if raw else None
        name = lean(kind, processed=False).name
        found.append(Check(name, "parameters / file", value, _PARAMETER_BYTES))
        for case, one in ((lean(kind, processed=False), raw), (lean(kind), processed)):
            beyond = _LARGEST_BYTES + (_EMBEDDING_BYTES if case.processed else 0)
            value = (one.peak_anonymous_bytes - beyond) / file_bytes if one else None
            promise = "peak anonymous memory beyond an embedding and a matrix / file"
            found.append(Check(case.name, promise, value, _PEAK_BYTES))
        for tokens, limit in _FORWARD.items():
            value = bounds.forward_ratio(processed, bounds.good(results, lean("")), tokens)
            found.append(Check(lean(kind).name, f"forward / dense, {tokens} tokens", value, limit))
    return found


_SHAPE = SHAPES[MODEL]
_LARGEST_BYTES = 4 * _SHAPE.d_model * _SHAPE.d_mlp
_EMBEDDING_BYTES = 4 * _SHAPE.d_model * _SHAPE.d_vocab  # one is processed


def _file_bytes(kind: str, cache: Path | None) -> int:
    folder = make_quantized_checkpoint(MODEL, kind, cache)
    return sum(path.stat().st_size for path in weight_files(folder))


def table(results: Results, planned: Sequence[Case]) -> Table:
    """Memory of each load, and its forward passes."""
    made = Table(
        title="Formats that are decoded at use, each in a fresh process, MB",
        caption="Memory above the imports. peak anon: highest private memory. after: private when "
        "loaded. /dense: multiple of the time of dense float32 weights.",
    )
    timed = [f"{n} tok {part}" for n in cases.FORWARD_TOKENS for part in ("ms", "/dense")]
    columns = ["peak anon", "after", "params", "s", *timed]
    return rows.grouped(made, columns, _row, results, planned, lambda case: f"{MODEL} {_DTYPE}")


def _row(results: Results, case: Case, found: Measurement) -> list[str]:
    memory = (found.peak_anonymous_bytes, found.after_anonymous_bytes, found.parameter_bytes)
    row = [rows.number(size / 1e6, ".0f") for size in memory]
    row.append(f"{found.median_seconds:.2f}")
    dense = bounds.good(results, lean(""))
    for tokens in cases.FORWARD_TOKENS:
        ratio = bounds.forward_ratio(found, dense, tokens)
        row += [rows.milliseconds(found, tokens), rows.number(ratio, ".2f")]
    return row
