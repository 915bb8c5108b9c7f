"""Processing a live model and loading a state dict into it, in place: checks, one parameter at a
time, and a mark on the model while it is written to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tl_fastload.errors import MissingWeightsError
from tl_fastload.ground import compat
from tl_fastload.ground.mark import require_whole
from tl_fastload.ground.own_defaults import own_defaults
from tl_fastload.ground.words import listed
from tl_fastload.hooked.already import is_already_processed, versions
from tl_fastload.hooked.layout import strides_in
from tl_fastload.hooked.names import role
from tl_fastload.hooked.processing import Session, record_processing
from tl_fastload.hooked.state_dicts import table_problem
from tl_fastload.hooked.steps import reason_to_skip
from tl_fastload.loading import checks
from tl_fastload.loading.load import notes_on, report_of, under_own_names
from tl_fastload.placement.half_written import InPlaceStep, require_cover
from tl_fastload.placement.placer import Placer
from tl_fastload.placement.values_here import require_given, require_values
from tl_fastload.quantized import has_quantized
from tl_fastload.quantized.quantizer import Quantizer
from tl_fastload.recipes.promise import Promise
from tl_fastload.report.memory import PeakSampler
from tl_fastload.report.progress import Progress
from tl_fastload.request.options import Options


def load_state_dict(
    model: Any, state_dict: Mapping[str, Any], flags: dict[str, bool], stock: Callable[..., None]
) -> None:
    """Run TransformerLens' `load_and_process_state_dict` on promises, then write what it would
    load.

    Args:
        model: the model to fill.
        state_dict: TransformerLens names -> tensors; not changed.
        flags: the processing steps.
        stock: the model's own bound `load_and_process_state_dict`.
    """
    doing = "load_and_process_state_dict"
    require_values(model, doing)
    named, notes = under_own_names(model, dict(state_dict))
    require_given(named, doing)
    named, tables = _own_tables_kept(model, named)
    checks.check_refactor(model.cfg, flags)
    checks.check_state_dict(model, named, flags)
    require_cover(model, doing, named)
    _check_norms_and_biases(model, named, flags)
    with InPlaceStep(model, doing) as step:
        _run(model, named, flags, stock, step, set(), [*notes, *tables])


def process(
    model: Any,
    flags: dict[str, bool],
    stock: Callable[..., None],
    stock_load: Callable[..., None],
) -> None:
    """TransformerLens' `process_weights_` of a live model, once.

    Args:
        model: the model.
        flags: the processing steps.
        stock: the model's own bound `process_weights_`, which version 2 replaces the norms in.
        stock_load: its bound `load_and_process_state_dict`.
    """
    require_whole(model, "process_weights_")
    require_values(model, "process_weights_")
    if is_already_processed(model, flags):
        return
    checks.check_refactor(model.cfg, flags)
    before: set[str] = getattr(model, "_processed", (set(), None))[0]
    with InPlaceStep(model, "process_weights_") as step:

        def load(state_dict: dict[str, Any], **asked: bool) -> None:
            checks.check_state_dict(model, state_dict, flags)
            _run(model, state_dict, {**flags, **asked}, stock_load, step, before, [])

        if (
            compat.REPLACES_NORMS
            and flags["fold_ln"]
            and reason_to_skip("fold_ln", model.cfg) is None
        ):
            asked = {name: on for name, on in flags.items() if name != "fold_value_biases"}
            shadow = _shadow(model, load_and_process_state_dict=load)
            _bound(stock, shadow)(**asked)
        else:
            load(model.state_dict())


def _run(
    model: Any,
    state_dict: dict[str, Any],
    flags: dict[str, bool],
    stock: Callable[..., None],
    step: InPlaceStep,
    before: set[str],
    notes: list[str],
) -> None:
    started = time.perf_counter()
    session = Session(Options(strategy="copy", progress=False), dict(flags), notes=notes)
    # The live model never knows the session: an interrupt could leave it there.
    shadow = _shadow(model, _session=session)
    with torch.inference_mode(False), own_defaults(), PeakSampler() as sampler:
        session.mark, session.watch = sampler.mark, sampler.watch
        sampler.mark("recording")
        record_processing(shadow, session, state_dict, flags, _bound(stock, shadow))
        _take_over(model, shadow, "_session")
        checks.check_in_place(model, session.recipes)
        sampler.mark("placing")
        _write(model, session, step)
    asked = {name for name, on in flags.items() if on}
    model._processed = (asked | before, versions(model))
    model.load_report = report_of(model, session, sampler, time.perf_counter() - started)


def _write(model: Any, session: Session, step: InPlaceStep) -> None:
    quantizer = Quantizer(None, role, session.shifts) if has_quantized(model) else None
    session.watch(set(_homes(model).values()))
    with Progress(session.options.progress) as progress:
        session.notes += write_recipes(model, session.recipes, step, quantizer, progress)
    session.not_quantized = quantizer.not_quantized if quantizer is not None else {}
    session.recipes, session.shifts = {}, {}


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
        strides_of=strides_in,
        quantizer=quantizer,
        fresh=False,
        writing=step.writes,
    )
    placer.place(recipes)
    return notes_on(placer)


def _homes(model: Any) -> dict[str, torch.device]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.device for name, tensor in tensors.items()}


def _shadow(model: Any, **attributes: Any) -> Any:
    """A stand-in of the same class and with the same modules, which knows some names otherwise."""
    shadow = object.__new__(type(model))
    shadow.__dict__.update({**model.__dict__, **attributes})
    return shadow


def _take_over(model: Any, shadow: Any, *but: str) -> None:
    """What TransformerLens has set on the stand-in (such as the table of hooks)."""
    for name, value in shadow.__dict__.items():
        if name not in but and model.__dict__.get(name) is not value:
            model.__dict__[name] = value


def _bound(method: Any, model: Any) -> Callable[..., None]:
    bound: Callable[..., None] = method.__func__.__get__(model)
    return bound


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
    own = dict(model.named_parameters())
    missing = [
        name
        for name, parameter in own.items()
        if name not in state_dict
        and role(name).kind != "matrix"
        and not _is_default(name, parameter)
    ]
    if missing:
        folded = any(role(name).is_folded for name in missing)
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
    if flags["fold_ln"] and reason_to_skip("fold_ln", model.cfg) is None:
        return
    lost = [
        name
        for name, value in state_dict.items()
        if role(name).is_folded and name not in own and not _is_default(name, value)
    ]
    if lost:
        raise MissingWeightsError(
            f"The model has no place for {listed(lost)}: its norms are folded into the layers "
            "behind them, those of the state dict are not. The model is unchanged. Fold them, too: "
            "fold_ln=True."
        )


@torch.no_grad()
def _is_default(name: str, value: torch.Tensor) -> bool:
    """Whether norm weights are one, or a bias is zero."""
    return bool((value == role(name).default).all())
