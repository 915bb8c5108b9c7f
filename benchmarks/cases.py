"""Which loads are measured, and in what order."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from benchmarks.measure import Case, run_case
from benchmarks.models import SHAPES
from tl_fastload.cli.bench.process import Measurement, measure_in_turns
from tl_fastload.ground import compat

DTYPES = ("float32", "bfloat16")
FORWARD_TOKENS = (1, 64)
REPEATED_LOADS = 10
Announce = Callable[[int, int, Case, Measurement], None]


def floor(model: str, dtype: str) -> Case:
    return Case(model, "floor", dtype)


def stock(model: str, dtype: str, processed: bool = True) -> Case:
    return Case(model, "stock", dtype, processed)


def lean(model: str, dtype: str, processed: bool = True) -> Case:
    return Case(model, "lean", dtype, processed)


def copied(model: str, dtype: str) -> Case:
    return Case(model, "lean", dtype, strategy="copy")


def from_hf_model(model: str, dtype: str) -> Case:
    return Case(model, "lean", dtype, from_hf_model=True)


def with_adapter(case: Case) -> Case:
    return replace(case, adapter=True)


def repeated(model: str, dtype: str, processed: bool = True) -> Case:
    return Case(model, "lean", dtype, processed, loads=REPEATED_LOADS)


def reload(model: str, dtype: str, quantize: str | None = None) -> Case:
    return Case(model, "reload", dtype, quantize=quantize)


def touch(model: str, dtype: str, quantize: str | None = None) -> Case:
    return Case(model, "touch", dtype, quantize=quantize)


def save(model: str, dtype: str) -> Case:
    return Case(model, "save", dtype)


def kinds_kept(model: str, dtype: str) -> tuple[str | None, ...]:
    """The kinds of processed copies that are measured; none is quantized where torch is too old."""
    is_quantized = SHAPES[model].family == "llama" and dtype == SHAPES[model].file_dtype
    return (None, "8bit", "nf4") if is_quantized and compat.can_assign() else (None,)


def has_peft() -> bool:
    """Whether loads with an adapter can be measured: its library is an extra."""
    return importlib.util.find_spec("peft") is not None


def transformers(model: str, dtype: str) -> Case:
    return Case(model, "transformers", dtype)


def all_cases(
    models: Iterable[str],
    dtypes: Iterable[str] = DTYPES,
    *,
    load: bool = True,
    forward: bool = True,
    with_stock: bool = True,
) -> list[Case]:
    """The cases of the benchmark; what is compared with each other stands together.

    Args:
        models: keys of `benchmarks.models.SHAPES`.
        dtypes: of the loaded parameters.
        load: measure loading: every case.
        forward: time forward passes, in the processes that load models which are compared.
        with_stock: measure TransformerLens' own loader too.
    """
    cases = []
    for model in models:
        for dtype in dtypes:
            compared = [lean(model, dtype), transformers(model, dtype)]
            only_loaded = [floor(model, dtype), copied(model, dtype), from_hf_model(model, dtype)]
            only_loaded.append(save(model, dtype))
            for quantize in kinds_kept(model, dtype):
                only_loaded += [touch(model, dtype, quantize), reload(model, dtype, quantize)]
            if with_stock:
                compared.append(stock(model, dtype))
            if dtype == SHAPES[model].file_dtype:
                compared.append(lean(model, dtype, processed=False))
                if with_stock:
                    compared.append(stock(model, dtype, processed=False))
                if SHAPES[model].family == "gpt2":
                    only_loaded += [repeated(model, dtype), repeated(model, dtype, False)]
            if has_peft():
                only_loaded.append(with_adapter(lean(model, dtype)))
                if with_stock and dtype == "float32":
                    only_loaded.append(with_adapter(stock(model, dtype)))
            if load:
                cases += only_loaded
            if forward:
                compared = [replace(case, forward_tokens=FORWARD_TOKENS) for case in compared]
            cases += compared
    return cases


def run_all(
    cases: list[Case], repeats: int, cache: Path | None, announce: Announce
) -> dict[str, Measurement]:
    """Run every case `repeats` times and combine, by the name of the case.

    The repeats of the cases of one model and dtype take turns, so that a machine that gets
    slower or faster meanwhile changes all that is compared alike.
    """
    rounds: list[Case] = []
    for _, group in groupby(cases, key=lambda case: (case.model, case.dtype)):
        together = list(group)
        for turn in range(repeats):
            rounds += [case for case in together if turn == 0 or case.loads == 1]

    def measure_one(number: int, case: Case) -> Measurement:
        measurement = run_case(case, cache)
        announce(number, len(rounds), case, measurement)
        return measurement

    return {case.name: found for case, found in measure_in_turns(rounds, measure_one).items()}
