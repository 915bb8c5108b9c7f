"""Quantized weights: which loads are measured, their bounds, and the table of the figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rich.table import Table

from benchmarks import bounds, cases, rows
from benchmarks.bounds import Check, Results
from benchmarks.measure import Case, Measurement
from benchmarks.models import SHAPES
from benchmarks.quantized_checkpoints import KINDS
from tl_fastload.cli.bench.synthetic import entry_shapes

_DTYPE = "bfloat16"
_PARAMETER_BYTES = 1.01  # a ratio of one, with room for zero biases
_PEAK_BYTES = 1.05
_FORWARD = {64: 1.3}
_SAME_LOG_PROBS = 0.15  # both compute in bfloat16, in another order
_WIDE_BYTES = 4  # of a number of a parameter that is being processed: float32


def lean(model: str, kind: str, saved: bool, processed: bool = True) -> Case:
    return Case(model, "lean", _DTYPE, processed, kind=kind, saved=saved)


def densify(model: str, kind: str) -> Case:
    return Case(model, "densify", _DTYPE, kind=kind, saved=True)


def transformers(model: str, kind: str, saved: bool = True) -> Case:
    return Case(model, "transformers", _DTYPE, kind=kind, saved=saved)


def transformers_exact(model: str, kind: str) -> Case:
    return Case(model, "transformers-exact", _DTYPE, kind=kind, saved=True)


def all_cases(models: Iterable[str], *, with_stock: bool = True) -> list[Case]:
    """The cases of the benchmark; what is compared with each other stands together.

    Args:
        models: keys of `benchmarks.models.SHAPES`; those of another family than Llama are left out.
        with_stock: measure TransformerLens' own loader in bfloat16 too.
    """
    found: list[Case] = []
    for model in models:
        if SHAPES[model].family != "llama":
            continue
        for kind in KINDS:
            timed = [
                lean(model, kind, saved=True),
                lean(model, kind, saved=True, processed=False),
                densify(model, kind),
                transformers(model, kind),
            ]
            if kind != "int8":
                timed.append(transformers_exact(model, kind))
            found += [replace(case, forward_tokens=cases.FORWARD_TOKENS) for case in timed]
            found += [lean(model, kind, saved=False), transformers(model, kind, saved=False)]
        if with_stock:
            found.append(replace(cases.stock(model, _DTYPE), forward_tokens=cases.FORWARD_TOKENS))
    return found


def checks(results: Results, models: Iterable[str]) -> list[Check]:
    """Every promise about the models measured. Tiny models, for trying things out, have none."""
    found: list[Check] = []
    for model in models:
        if SHAPES[model].bounded and SHAPES[model].family == "llama":
            for kind in KINDS:
                found += _memory(results, model, kind)
                found += _forward_time(results, model, kind)
    return found


def _memory(results: Results, model: str, kind: str) -> Iterator[Check]:
    for saved in (True, False):
        case = lean(model, kind, saved)
        found, reference = (
            bounds.good(results, case),
            bounds.good(results, transformers(model, kind, saved)),
        )
        value = found.parameter_bytes / reference.parameter_bytes if found and reference else None
        promise = "parameters, as a multiple of transformers' quantized model"
        yield Check(case.name, promise, value, _PARAMETER_BYTES)
    case = lean(model, kind, saved=False)
    found = bounds.good(results, case)
    for name, bytes_ in (
        ("peak anonymous memory", found.peak_anonymous_bytes if found else 0),
        ("peak resident memory", found.peak_resident_bytes if found else 0),
    ):
        value = (bytes_ - largest_parameter_bytes(model)) / found.parameter_bytes if found else None
        promise = f"{name} less one full-precision parameter"
        yield Check(case.name, promise, value, _PEAK_BYTES)


def largest_parameter_bytes(model: str) -> int:
    """Bytes of the largest parameter of a model in float32, which it is processed in."""
    sizes = entry_shapes(SHAPES[model]).values()
    return max(_WIDE_BYTES * rows * columns for rows, columns in (s for s in sizes if len(s) == 2))


def _forward_time(results: Results, model: str, kind: str) -> Iterator[Check]:
    references = {"transformers'": transformers(model, kind)}
    if kind != "int8":
        references["transformers' on the same kernel"] = exact_reference(model, kind)
    for processed in (True, False):
        case = lean(model, kind, True, processed)
        found = bounds.good(results, case)
        for name, reference in references.items():
            for tokens, limit in _FORWARD.items():
                value = bounds.forward_ratio(found, bounds.good(results, reference), tokens)
                yield Check(case.name, f"forward / {name}, {tokens} tokens", value, limit)
        exact = bounds.good(results, exact_reference(model, kind))
        difference = bounds.log_prob_difference(found, exact)
        promise = "log-probabilities, largest difference from transformers'"
        yield Check(case.name, promise, difference, _SAME_LOG_PROBS, unit="")


def exact_reference(model: str, kind: str) -> Case:
    """transformers' model on the kernels that ours runs on."""
    return transformers(model, kind) if kind == "int8" else transformers_exact(model, kind)


def table(results: Results, planned: Sequence[Case]) -> Table:
    """Memory and time of every quantized load, and of stock's load in bfloat16."""
    made = Table(
        title="Quantized weights, each in a fresh process (time: median, memory: largest), MB",
        caption="Memory above the imports. peak anon: highest private memory. resident: highest, "
        "file pages included. after: private when loaded. in use: resident after forward passes. "
        "/hf: multiple of the time of transformers' model as it comes; /same: of transformers' "
        "model on the same kernel. log-probs: largest difference from the latter's.",
    )
    timed = [f"{n} tok {part}" for n in cases.FORWARD_TOKENS for part in ("ms", "/hf", "/same")]
    columns = ["peak anon", "resident", "after", "in use", "params", "s", *timed, "log-probs"]
    stock = [case for case in planned if case.name == cases.stock(case.model, _DTYPE).name]
    shown = [*(case for case in planned if case.kind), *stock]
    return rows.grouped(
        made,
        columns,
        _row,
        results,
        shown,
        lambda case: f"{case.model} {case.dtype} {case.kind}".strip(),
    )


def _row(results: Results, case: Case, found: Measurement) -> list[str]:
    memory = (
        found.peak_anonymous_bytes,
        found.peak_resident_bytes,
        found.after_anonymous_bytes,
        found.used_resident_bytes if case.forward_tokens else None,
        found.parameter_bytes,
    )
    row = [rows.number(None if size is None else size / 1e6, ".0f") for size in memory]
    row.append(f"{found.median_seconds:.2f}")
    as_it_comes = bounds.good(results, transformers(case.model, case.kind)) if case.kind else None
    exact = bounds.good(results, exact_reference(case.model, case.kind)) if case.kind else None
    for tokens in cases.FORWARD_TOKENS:
        row.append(rows.milliseconds(found, tokens))
        both = (bounds.forward_ratio(found, one, tokens) for one in (as_it_comes, exact))
        row += [rows.number(ratio, ".2f") for ratio in both]
    return [*row, rows.number(bounds.log_prob_difference(found, exact), ".1e")]
