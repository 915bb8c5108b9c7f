"""TransformerBridge: which loads are measured, their bounds, and the table of the figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rich.table import Table

from benchmarks import bounds, cases, rows
from benchmarks.bounds import Check, Results
from benchmarks.measure import Case, Measurement
from benchmarks.models import SHAPES

_RAW_BYTES = 0.02
_MAPPED_BYTES = 0.70  # of a model that is processed in its file's bfloat16: embeddings are mapped
# Of GPT-2, the fused matrices stay mapped beside the parts that were made of them, and count as
# parameters: 1.03x of the others.
_READ_BYTES = {"llama": 1.03, "gpt2": 0.87}
_FASTER_LOAD = {"gpt2": 2.0, "llama": 5.0}
_NO_SLOWER = 0.95  # a ratio of one, with room for noise
_SAME_LOG_PROBS = 1e-4


def lean(model: str, dtype: str, processed: bool = True) -> Case:
    return Case(model, "bridge-lean", dtype, processed)


def in_place(model: str, dtype: str) -> Case:
    return Case(model, "bridge-in-place", dtype)


def stock(model: str, dtype: str, processed: bool = True) -> Case:
    return Case(model, "bridge-stock", dtype, processed)


def all_cases(
    models: Iterable[str],
    dtypes: Iterable[str] = cases.DTYPES,
    *,
    forward: bool = True,
    with_stock: bool = True,
) -> list[Case]:
    """The cases of the benchmark; what is compared with each other stands together.

    Args:
        models: keys of `benchmarks.models.SHAPES`.
        dtypes: of the loaded parameters; nothing is mapped where the file's is another.
        forward: time forward passes too.
        with_stock: measure TransformerLens' own bridge too.
    """
    found: list[Case] = []
    for model in models:
        for dtype in dtypes:
            if SHAPES[model].family == "gpt2" and dtype != SHAPES[model].file_dtype:
                continue
            timed = [lean(model, dtype), cases.transformers(model, dtype)]
            if with_stock:
                timed.append(stock(model, dtype))
            if dtype == SHAPES[model].file_dtype:
                timed.append(lean(model, dtype, processed=False))
                timed += [stock(model, dtype, processed=False)] if with_stock else []
            tokens = cases.FORWARD_TOKENS if forward else ()
            found += [replace(case, forward_tokens=tokens) for case in timed]
            found.append(in_place(model, dtype))
    return found


def of(planned: Sequence[Case]) -> list[Case]:
    """Those of a run that belong in the table of bridges: with what they are compared to."""
    dtypes = {(case.model, case.dtype) for case in planned if case.road.startswith("bridge")}
    return [
        case
        for case in planned
        if case.road.startswith("bridge")
        or (case.road == "transformers" and not case.kind and (case.model, case.dtype) in dtypes)
    ]


def checks(results: Results, models: Iterable[str]) -> list[Check]:
    """Every promise about the models measured. Tiny models, for trying things out, have none."""
    found: list[Check] = []
    for shape in (SHAPES[model] for model in models):
        for dtype in cases.DTYPES if shape.bounded else ():
            if lean(shape.name, dtype).name in results:
                found += _memory(results, shape.name, dtype)
                found += _time(results, shape.name, dtype)
    return found


def _memory(results: Results, model: str, dtype: str) -> Iterator[Check]:
    same = dtype == SHAPES[model].file_dtype
    limits = [(lean(model, dtype), _READ_BYTES[SHAPES[model].family])]
    if same and dtype == "bfloat16":
        limits = [(lean(model, dtype), _MAPPED_BYTES)]
    if same:
        limits.append((lean(model, dtype, processed=False), _RAW_BYTES))
    for case, limit in limits:
        found = bounds.good(results, case)
        value = bounds.ratio(found.peak_anonymous_bytes, found) if found else None
        yield Check(case.name, "peak anonymous memory", value, limit)


def _time(results: Results, model: str, dtype: str) -> Iterator[Check]:
    case, other = lean(model, dtype), stock(model, dtype)
    found, reference = bounds.good(results, case), bounds.good(results, other)
    value, limit = bounds.faster(found, reference), _FASTER_LOAD[SHAPES[model].family]
    promise = "faster than boot and compatibility mode"
    yield Check(case.name, promise, value, limit, at_least=True)
    for tokens in cases.FORWARD_TOKENS:
        for processed in (True, False):
            case = lean(model, dtype, processed)
            if case.name in results:
                reference = bounds.good(results, stock(model, dtype, processed))
                value = bounds.forward_ratio(reference, bounds.good(results, case), tokens)
                promise = f"forward not slower than stock's, {tokens} tokens"
                yield Check(case.name, promise, value, _NO_SLOWER, at_least=True)
    if dtype == "float32":
        theirs = bounds.good(results, cases.transformers(model, dtype))
        difference = bounds.log_prob_difference(found, theirs)
        promise = "log-probabilities, largest difference from transformers'"
        yield Check(lean(model, dtype).name, promise, difference, _SAME_LOG_PROBS, unit="")


def table(results: Results, planned: Sequence[Case]) -> Table:
    """Memory and time of every bridge, and the forward time of transformers' own model."""
    made = Table(
        title="TransformerBridge, each in a fresh process (time: median, memory: largest)",
        caption="Memory above the imports, as multiples of the parameters' bytes: highest private, "
        "highest resident with file pages, and private when loaded. /hf: multiple of the time of "
        "transformers' own model. log-probs: largest difference from its.",
    )
    timed = [f"{tokens} tok {part}" for tokens in cases.FORWARD_TOKENS for part in ("ms", "/hf")]
    columns = ["peak anon", "resident", "after", "vs stock", "s", "MB", *timed, "log-probs"]
    return rows.grouped(made, columns, _row, results, planned)


def _row(results: Results, case: Case, found: Measurement) -> list[str]:
    memory = (found.peak_anonymous_bytes, found.peak_resident_bytes, found.after_anonymous_bytes)
    row = [f"{bounds.ratio(size, found):.2f}x" for size in memory]
    compared = case.road.startswith("bridge")
    reference = bounds.good(results, stock(case.model, case.dtype, case.processed))
    faster = bounds.faster(found, reference) if compared else None
    row.append(rows.number(faster, ".1f", "x"))
    row += [f"{found.median_seconds:.2f}", f"{found.parameter_bytes / 1e6:.0f}"]
    theirs = bounds.good(results, cases.transformers(case.model, case.dtype))
    for tokens in cases.FORWARD_TOKENS:
        row.append(rows.milliseconds(found, tokens))
        row.append(rows.number(bounds.forward_ratio(found, theirs, tokens), ".2f"))
    return [*row, rows.number(bounds.log_prob_difference(found, theirs), ".1e")]
