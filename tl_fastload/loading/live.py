"""Processing a live model and loading a state dict into it, in place: checks, one parameter at a
time, and a mark on the model while it is written to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from tl_fastload.errors import MissingWeightsError
from tl_fastload.ground.mark import require_whole
from tl_fastload.ground.own_defaults import own_defaults
from tl_fastload.ground.role import Role
from tl_fastload.ground.words import listed
from tl_fastload.ground.wrappers import named_as
from tl_fastload.loading import checks
from tl_fastload.loading.load import notes_on
from tl_fastload.placement.half_written import InPlaceStep, require_cover
from tl_fastload.placement.own_values import parameter_versions, table_problem
from tl_fastload.placement.placer import Placer
from tl_fastload.placement.values_here import require_given, require_values
from tl_fastload.quantized import has_quantized, quantized_kinds
from tl_fastload.quantized.quantizer import Quantizer
from tl_fastload.recipes.promise import Promise
from tl_fastload.report.load_report import LoadReport
from tl_fastload.report.memory import PeakSampler
from tl_fastload.report.progress import Progress
from tl_fastload.roads.known import describe_steps, road_of
from tl_fastload.roads.road import Recording

Record = Callable[[dict[str, Any], dict[str, bool]], Recording]
"""Records what TransformerLens makes of a state dict, from it and the processing steps."""


def load_state_dict(
    model: Any,
    state_dict: Mapping[str, Any],
    flags: dict[str, bool],
    record: Record,
) -> None:
    """Write what TransformerLens' `load_and_process_state_dict` would load.

    Args:
        model: the model to fill.
        state_dict: TransformerLens names -> tensors; not changed.
        flags: the processing steps.
        record: runs TransformerLens' code.
    """
    doing = "load_and_process_state_dict"
    require_values(model, doing)
    named, renaming = named_as(model, dict(state_dict), road_of(model).folded_names(model))
    if renaming.ambiguous is not None:
        raise MissingWeightsError(
            f"The state dict's keys do not fit the model, and {renaming.ambiguous}. Nothing was "
            "loaded. Pass the keys of one model, without what stands in front of them."
        )
    require_given(named, doing)
    named, tables = _own_tables_kept(model, named)
    road_of(model).check_flags(model.cfg, flags)
    checks.check_state_dict(model, named, flags)
    require_cover(model, doing, named)
    _check_norms_and_biases(model, named, flags)
    with InPlaceStep(model, doing) as step:
        notes = [*renaming.notes, *tables]
        _run(model, lambda: record(named, flags), step, set(), notes)


def process(
    model: Any,
    flags: dict[str, bool],
    record: Record,
    hand_over: Callable[[Callable[..., None]], None],
) -> None:
    """TransformerLens' `process_weights_` of a live model, once.

    Args:
        model: the model.
        flags: the processing steps.
        record: runs TransformerLens' code on a state dict.
        hand_over: calls its argument with the state dict that is to be processed, and by name with
            steps that are others than `flags`.
    """
    require_whole(model, "process_weights_")
    require_values(model, "process_weights_")
    if _is_already_processed(model, flags):
        return
    road_of(model).check_flags(model.cfg, flags)
    before: set[str] = getattr(model, "_processed", (set(), None))[0]
    with InPlaceStep(model, "process_weights_") as step:

        def load(state_dict: dict[str, Any], **asked: bool) -> None:
            checks.check_state_dict(model, state_dict, flags)
            _run(model, lambda: record(state_dict, {**flags, **asked}), step, before, [])

        hand_over(load)


def _is_already_processed(model: Any, flags: dict[str, bool]) -> bool:
    """Whether these steps were done and no parameter has changed since; the report says so then."""
    asked = {step for step, value in flags.items() if value}
    done, at_the_time = getattr(model, "_processed", (set(), None))
    if not asked <= done or parameter_versions(model) != at_the_time:
        return False
    # Quantized bytes cannot be edited in place; other values can, unseen, through `.data`.
    if not has_quantized(model) and not road_of(model).is_processed(model, flags):
        return False
    note = "process_weights_ was called again with nothing changed: nothing was done."
    model.load_report = replace(model.load_report, notes=(*model.load_report.notes, note))
    return True


def _run(
    model: Any,
    record: Callable[[], Recording],
    step: InPlaceStep,
    before: set[str],
    notes: list[str],
) -> None:
    """Record and write; `before` are the steps that were done earlier."""
    started = time.perf_counter()
    with torch.inference_mode(False), own_defaults(), PeakSampler() as sampler:
        sampler.mark("recording")
        recording = record()
        checks.check_in_place(model, recording.recipes)
        sampler.mark("placing")
        sampler.watch(set(_homes(model).values()))
        quantizer = None
        if has_quantized(model):
            quantizer = Quantizer(None, road_of(model).role, recording.shifts)
        with Progress(False) as progress:
            written = write_recipes(model, recording.recipes, step, quantizer, progress)
    asked = {name for name, on in recording.requested.items() if on}
    model._processed = (asked | before, parameter_versions(model))
    kinds = ", ".join(sorted(quantized_kinds(model)))
    report = LoadReport.of(
        model,
        strategy="copy",
        reason="parameters keep their identity",
        source="state_dict",
        processing=describe_steps(model, recording.requested),
        quantization=f"{kinds}, as in the model" if kinds else None,
        not_quantized={} if quantizer is None else quantizer.not_quantized,
        notes=(*notes, *recording.notes, *written),
    )
    model.load_report = report.measured(sampler, time.perf_counter() - started)


def write_recipes(
    model: Any,
    recipes: dict[str, Promise],
    step: InPlaceStep,
    quantizer: Quantizer | None,
    progress: Progress,
) -> list[str]:
    """Write into the tensors of a live model, one at a time.

    Args:
        model: keeps its Parameter objects.
        recipes: name -> what its values become.
        step: that has begun on the model.
        quantizer: makes the quantized ones; None for a model without.
        progress: told how far it is.

    Returns:
        Notes for the report.
    """
    placer = Placer(
        model,
        _homes(model).__getitem__,
        assign=False,
        maps=None,
        map_any_layout=False,
        progress=progress,
        strides_of=road_of(model).strides_in,
        quantizer=quantizer,
        fresh=False,
        writing=step.writes,
    )
    placer.place(recipes)
    return notes_on(placer, road_of(model))


def _homes(model: Any) -> dict[str, torch.device]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.device for name, tensor in tensors.items()}


def _own_tables_kept(model: Any, state_dict: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The state dict without tables (masks, rotary embeddings) of another length, which the model
    has computed from its own configuration.
    """
    problems = {}
    for name, buffer in model.named_buffers():
        value = state_dict.get(name)
        if not isinstance(value, torch.Tensor):
            continue
        problem = table_problem(name, value.shape, value.dtype, buffer)
        if problem is not None:
            problems[name] = problem
    kept = {name: value for name, value in state_dict.items() if name not in problems}
    return kept, [f"The model's own table stays: {problem}." for problem in problems.values()]


def _check_norms_and_biases(
    model: Any, state_dict: Mapping[str, Any], flags: Mapping[str, bool]
) -> None:
    """Raise MissingWeightsError where the model's own norms or biases would be mixed with other
    weights, or norms of the state dict would be lost.
    """
    own, road = dict(model.named_parameters()), road_of(model)
    missing = [
        name
        for name, parameter in own.items()
        if name not in state_dict
        and road.role(name).kind != "matrix"
        and not _is_default(road.role(name), parameter)
    ]
    if missing:
        folded = any(road.role(name).is_folded for name in missing)
        raise MissingWeightsError(
            f"The state dict lacks {listed(missing)}, and the model's own are trained: they belong "
            "to other weights. The model is unchanged. "
            + (
                "The weights seem to come from a processed model, whose norms are folded away: "
                "load them with load_weights_ into a model that is processed alike."
                if folded
                else "Pass a complete state dict."
            )
        )
    if flags["fold_ln"] and road.why_skipped("fold_ln", model.cfg) is None:
        return
    lost = [
        name
        for name, value in state_dict.items()
        if road.role(name).is_folded and name not in own and not _is_default(road.role(name), value)
    ]
    if lost:
        raise MissingWeightsError(
            f"The model has no place for {listed(lost)}: its norms are folded into the layers "
            "behind them, those of the state dict are not. The model is unchanged. Fold them, too: "
            "fold_ln=True."
        )


@torch.no_grad()
def _is_default(role: Role, value: torch.Tensor) -> bool:
    """Whether norm weights are one, or a bias is zero."""
    return bool((value == role.default).all())
