"""One load, from a name to a placed model: the order of events, and what is checked before the
next.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tl_fastload.errors import MissingWeightsError
from tl_fastload.ground.own_defaults import own_defaults
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.ground.words import format_bytes, listed
from tl_fastload.ground.wrappers import named_as, unwrapped
from tl_fastload.hooked import steps
from tl_fastload.hooked.already import versions
from tl_fastload.hooked.empty import build_empty, build_outline, device_map
from tl_fastload.hooked.layout import strides_in
from tl_fastload.hooked.norms import kept_norms
from tl_fastload.hooked.observer import Observer
from tl_fastload.hooked.origin import Origin, find_origin
from tl_fastload.hooked.processing import Session, record_processing
from tl_fastload.hooked.stock import run_from_pretrained
from tl_fastload.loading import checks
from tl_fastload.placement.placer import Placer
from tl_fastload.placement.rehearsal import forecast
from tl_fastload.quantized import has_quantized, quantized_kinds
from tl_fastload.quantized.quantizer import Quantizer
from tl_fastload.quantized.spec import warn_of_runtime
from tl_fastload.recipes.promise import Promise
from tl_fastload.report.available import check_room, is_ample, let_go_on_error
from tl_fastload.report.load_report import LoadReport
from tl_fastload.report.memory import PeakSampler, return_freed_memory
from tl_fastload.report.progress import Progress
from tl_fastload.request.call import Request
from tl_fastload.request.steps import STEPS
from tl_fastload.source.reader import FileReader


def load(request: Request) -> Any:
    """Load a model from its checkpoint."""
    started = time.perf_counter()
    request.check()
    reader = FileReader()
    return_freed_memory()  # such as a model that was dropped before: glibc still holds its pages
    try:
        # Parameters made in inference mode could never be trained or saved.
        with torch.inference_mode(False), own_defaults(), PeakSampler() as sampler:
            sampler.mark("configuration")
            model, session = _load(request, reader, sampler)
            reader.files.check_all()
    finally:
        reader.close()
    model._processed = ({step for step, on in session.requested.items() if on}, versions(model))
    model.load_report = report_of(model, session, sampler, time.perf_counter() - started)
    return model


def record(request: Request, ledger: Observer | None = None) -> tuple[Any, Session]:
    """Do what comes before the weights are read, from the configuration and the headers alone.

    Args:
        request: the call.
        ledger: counts what stock would need.

    Returns:
        The model on the meta device, and the session with the recipes and their placer.
    """
    request = request.with_options(only_plan=True, progress=False)
    request.check()
    reader = FileReader()
    try:
        with torch.inference_mode(False), own_defaults():
            found = _load(request, reader, ledger=ledger)
            reader.files.check_all()
            return found
    finally:
        reader.close()


def _load(
    request: Request,
    reader: FileReader,
    sampler: PeakSampler | None = None,
    ledger: Observer | None = None,
) -> tuple[Any, Session]:
    options, arguments, keywords = request.options, dict(request.arguments), dict(request.keywords)
    model_name, hf_model = arguments.pop("model_name"), unwrapped(arguments.pop("hf_model"))
    move_to_device = arguments.pop("move_to_device")
    if "torch_dtype" in keywords:
        arguments["torch_dtype"] = keywords.pop("torch_dtype")
    dtype = arguments.get("torch_dtype", arguments["dtype"])
    origin = find_origin(model_name, hf_model, keywords, reader, options, dtype)
    checks.check_quantization(origin, options, arguments)
    checks.check_adapters(origin, options)
    requested = {step: bool(arguments[step]) for step in STEPS}
    session = Session(
        replace(options, move_to_device=move_to_device),
        requested,
        origin,
        ledger=ledger,
    )
    if sampler is not None:
        session.mark, session.watch = sampler.mark, sampler.watch
    session.mark("recording")
    origin.stock_ledger = ledger
    build_model = build_outline if options.only_plan else build_empty

    def build(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        checks.check_refactor(cfg, session.requested)
        session.notes.extend(kept_norms(cfg, session.requested))
        origin.is_recording = False
        model = build_model(request.cls, cfg, origin, session.notes, *args, **kwargs)
        origin.is_recording = True
        if ledger is not None:
            ledger.prepare(model)
        model._session = session
        return model

    shown = str(model_name)
    if shown.lower().startswith(("t5", "bert")):
        shown = f"./{shown}"  # TransformerLens takes such names for other kinds of models
    try:
        model = run_from_pretrained(
            origin, build, shown, quiet=options.only_plan, move_to_device=False, **arguments
        )
    except Exception as error:
        checks.explain(origin, error, arguments)
        raise
    model._session = None
    origin.root = None
    model._hf_config = copy.deepcopy(origin.hf_config)
    model._layout = str(options.layout)
    return model, session


def load_state_dict_into(
    model: Any, state_dict: dict[str, Any], flags: dict[str, bool], stock: Callable[..., None]
) -> None:
    """Run TransformerLens' `load_and_process_state_dict` on promises for the model that is being
    loaded, then place what it would load.

    Args:
        model: the model to fill, with its session.
        state_dict: TransformerLens names -> tensors or promises; not changed.
        flags: the processing steps.
        stock: the model's own bound `load_and_process_state_dict`.
    """
    session: Session = model._session
    state_dict, notes = under_own_names(model, state_dict)
    session.notes.extend(notes)
    record_processing(model, session, state_dict, flags, stock)
    assert session.origin is not None
    checks.check_recipes(model, session.origin, session.recipes)
    session.origin.is_recording = False
    _place(model, session, session.origin)


def under_own_names(
    model: Any, state_dict: dict[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The state dict without wrappers' prefixes, and what the report has to say about it.

    Raises:
        MissingWeightsError: keys of two models.
    """
    named, renaming = named_as(model, state_dict)
    if renaming.ambiguous is not None:
        raise MissingWeightsError(
            f"The state dict's keys do not fit the model, and {renaming.ambiguous}. Nothing was "
            "loaded. Pass the keys of one model, without what stands in front of them."
        )
    return named, renaming.notes


def _place(model: nn.Module, session: Session, origin: Origin) -> None:
    session.mark("placing")
    options = session.options
    device_of = device_map(model, options.move_to_device)
    quantizer = None
    if origin.spec is not None or options.quantize is not None or has_quantized(model):
        quantizer = Quantizer(options.quantize, session.shifts)
    with Progress(options.progress) as progress:
        placer = Placer(
            model,
            device_of,
            assign=options.assigns,
            maps=origin.reader.maps,
            map_any_layout=not any(session.requested.values()),
            progress=progress,
            strides_of=strides_in,
            quantizer=quantizer,
            fresh=True,
            order=str(options.layout),
            map_gaps=options.mmap is True,
        )
        if options.only_plan:
            session.placer = placer
            return
        _check_and_fill(model, session, origin, placer)
    session.mapped_bytes = placer.mapped_bytes
    session.not_quantized = quantizer.not_quantized if quantizer is not None else {}
    session.recipes, session.shifts = {}, {}
    session.notes += notes_on(placer)


def notes_on(placer: Placer) -> list[str]:
    """What a report says of values that were placed."""
    notes = []
    if placer.unseen_bytes:
        notes.append(
            f"{format_bytes(placer.unseen_bytes)} of mapped weights were not read, so not searched "
            "for NaN and infinite values."
        )
    if placer.not_finite:
        notes.append(f"NaN or infinite values in {listed(placer.not_finite)}.")
    return notes


def _check_and_fill(model: nn.Module, session: Session, origin: Origin, placer: Placer) -> None:
    """Fill a new model, if there is room for it."""
    devices = {placer.device_of(name) for name in session.recipes}
    session.watch(devices)
    elements = sum(recipe.numel() for recipe in session.recipes.values())
    if session.options.check_memory and not is_ample(elements, devices):
        check_room(_needed_bytes(placer, session.recipes), origin.label)
    with let_go_on_error(model, origin.label):
        placer.place(session.recipes)
        for name, buffer in list(model.named_buffers()):
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = buffer.to(placer.device_of(name))


def _needed_bytes(placer: Placer, recipes: dict[str, Promise]) -> dict[torch.device, int]:
    """The most that placing allocates on each device, with the buffers that move there."""
    found = forecast(placer, recipes)
    needed = dict(found.peak_bytes)
    for name, buffer in placer.model.named_buffers():
        device = placer.device_of(name)
        if device != buffer.device and name not in found.held_bytes:
            needed[device] = needed.get(device, 0) + bytes_of(buffer)
    return needed


def report_of(model: Any, session: Session, sampler: PeakSampler, seconds: float) -> LoadReport:
    """What a load did, for its model.

    Args:
        model: what was loaded into.
        session: of the load.
        sampler: of its memory.
        seconds: that it took.
    """
    origin = session.origin
    if origin is not None:
        model._quantization = session.options.quantize or origin.spec
    report = LoadReport.of(
        model,
        strategy="assign" if session.options.assigns else "copy",
        reason=session.options.reason() if origin is not None else "parameters keep their identity",
        source=origin.label if origin is not None else "state_dict",
        mapped_bytes=session.mapped_bytes,
        processing=steps.describe(session.requested, model.cfg),
        quantization=quantization(session, model),
        not_quantized=session.not_quantized,
        adapters=tuple(a.describe() for a in origin.adapters) if origin is not None else (),
        notes=(
            *(origin.notes if origin is not None else ()),
            *(warn_of_runtime(origin.spec or origin.dequantized) if origin is not None else ()),
            *session.notes,
        ),
        revision=origin.commit if origin is not None else None,
    )
    return report.measured(sampler, seconds)


def quantization(session: Session, model: nn.Module | None = None) -> str | None:
    """What is quantized and how, in words; None for a model without.

    Args:
        session: of the load.
        model: what was loaded into, whose weights may have been quantized before.
    """
    if session.options.quantize is not None:
        return f"{session.options.quantize.kind}, quantized while loading"
    if session.origin is not None and session.origin.spec is not None:
        return f"{session.origin.spec.kind}, as in the checkpoint"
    kinds = sorted(quantized_kinds(model)) if model is not None else []
    return f"{', '.join(kinds)}, as in the model" if kinds else None
