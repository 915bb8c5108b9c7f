"""One load: record, check, place, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tl_fastload.errors import RecordingError, warn_numbers
from tl_fastload.ground.own_defaults import own_defaults
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.ground.words import format_bytes, listed
from tl_fastload.ground.wrappers import unwrapped
from tl_fastload.huggingface.pretrained import Pretrained, find
from tl_fastload.loading import checks
from tl_fastload.placement.own_values import parameter_versions
from tl_fastload.placement.placer import Placer
from tl_fastload.placement.rehearsal import forecast
from tl_fastload.placement.spread import CPU
from tl_fastload.quantized import has_quantized
from tl_fastload.quantized.quantizer import Quantizer
from tl_fastload.quantized.spec import warn_of_runtime
from tl_fastload.recipes.promise import Promise
from tl_fastload.report.available import check_room, is_ample, let_go_on_error
from tl_fastload.report.load_report import LoadReport
from tl_fastload.report.memory import PeakSampler, return_freed_memory
from tl_fastload.report.progress import Progress
from tl_fastload.request.options import Options
from tl_fastload.roads.homes import homes
from tl_fastload.roads.known import describe_steps
from tl_fastload.roads.observer import Observer
from tl_fastload.roads.road import Recording, Request, Road
from tl_fastload.shards.fill import Sharding
from tl_fastload.shards.load import agreed, begin, finish
from tl_fastload.source.reader import FileReader

Watch = Callable[[Iterable[torch.device]], None]
"""Told of the devices that a load uses, before it does."""


def load(request: Request) -> Any:
    """Load a model from its checkpoint, by a call that is resolved."""
    started = time.perf_counter()
    reader = FileReader()
    return_freed_memory()  # such as a model that was dropped before: glibc still holds its pages
    try:
        # Parameters made in inference mode could never be trained or saved.
        with torch.inference_mode(False), own_defaults(), PeakSampler() as sampler:
            sampler.mark("configuration")
            with agreed(request.options):
                recording = record(request, reader, mark=sampler.mark)
                checks.check_recipes(recording)
            sampler.mark("placing")
            sharding = begin(request.options, recording.model, recording.recipes)
            placer = place(request, recording, sampler.watch, sharding)
            recording.model = request.road.finished(recording.model, placer.device_of)
            request.road.put_to_work(recording.model, placer.spread)
            reader.files.check_all()
            if sharding is not None:
                finish(sharding, request.options)
    finally:
        reader.close()
    model = recording.model
    asked = {step for step, on in recording.requested.items() if on}
    model._processed = (asked, parameter_versions(model))
    model.load_report = report_of(request, recording, placer).measured(
        sampler, time.perf_counter() - started
    )
    return model


def record(
    request: Request,
    reader: FileReader,
    *,
    headers_only: bool = False,
    observer: Observer | None = None,
    mark: Callable[[str], None] = lambda phase: None,
) -> Recording:
    """Find out what a load places, without reading weights.

    Args:
        request: the call, resolved.
        reader: reads the files later.
        headers_only: no weights are wanted: nothing is downloaded but configurations and headers,
            and the model is on the meta device.
        observer: told of what TransformerLens would hold.
        mark: told the name of each phase as it begins.

    Raises:
        LeanLoadError: what the load itself would raise.
    """
    if request.located is None:
        raise RecordingError("A call was to be recorded that nobody has resolved.")
    pretrained = find(
        request.located,
        request.options,
        request.keywords,
        request.road.supported,
        reader,
        dtype=request.dtype,
        hf_model=unwrapped(request.arguments["hf_model"]),
        headers_only=headers_only,
    )
    checks.check_quantization(pretrained, request.options, request.arguments)
    checks.check_adapters(pretrained, request.options)
    mark("recording")
    try:
        recording = request.road.record(
            request, pretrained, on_meta=headers_only, observer=observer
        )
    except Exception as error:
        checks.explain(pretrained, error, request.arguments)
        raise
    recording.model._layout = str(request.options.layout)
    recording.model._quantization = request.options.quantize or pretrained.spec
    return recording


def placer_for(request: Request, recording: Recording, progress: Progress) -> Placer:
    """What places a recording in a new model."""
    options, model = request.options, recording.model
    quantizer = None
    spec = options.quantize or getattr(recording.pretrained, "spec", None)
    if spec is not None or has_quantized(model):
        quantizer = Quantizer(options.quantize, request.road.roles_in(model), recording.shifts)
    placer = Placer(
        model,
        lambda name: CPU,
        assign=options.assigns,
        maps=None if recording.pretrained is None else recording.pretrained.reader.maps,
        map_any_layout=not any(recording.requested.values()),
        progress=progress,
        strides_of=request.road.strides_in,
        quantizer=quantizer,
        fresh=True,
        order=str(options.layout),
        map_gaps=options.mmap is True,
    )
    placer.device_of, placer.spread = homes(
        request,
        model,
        lambda: {} if quantizer is None else forecast(placer, recording.recipes).quantized_bytes,
    )
    if placer.spread is not None:
        recording.notes.append(placer.spread.describe())
        if placer.spread.disk:
            found = forecast(placer, recording.recipes)
            placer.spread.require_mapped(found.held_bytes)
    return placer


def place(
    request: Request, recording: Recording, watch: Watch, sharding: Sharding | None = None
) -> Placer:
    """Fill the new model of a recording, if there is room for it; its recipes are used up."""
    model, pretrained = recording.model, recording.pretrained
    assert pretrained is not None  # new models are never made for a state dict alone
    pretrained.root = None
    with Progress(request.options.progress) as progress:
        placer = placer_for(request, recording, progress)
        devices = {placer.device_of(name) for name in recording.recipes}
        watch(devices)
        elements = sum(recipe.numel() for recipe in recording.recipes.values())
        if request.options.check_memory and not is_ample(elements, devices):
            with agreed(request.options):
                check_room(_needed_bytes(placer, recording.recipes, sharding), pretrained.label)
        with let_go_on_error(model, pretrained.label):
            if sharding is not None:
                sharding.exchange(recording.recipes)
            with agreed(request.options):
                placer.place(recording.recipes)
            for name, buffer in list(model.named_buffers()):
                parent, _, leaf = name.rpartition(".")
                model.get_submodule(parent)._buffers[leaf] = buffer.to(placer.device_of(name))
    recording.shifts = {}
    return placer


def _needed_bytes(
    placer: Placer, recipes: dict[str, Promise], sharding: Sharding | None
) -> dict[torch.device, int]:
    """The most that placing allocates on each device, with the buffers that move there."""
    exchanged = {} if sharding is None else sharding.exchanged_bytes()
    found = forecast(placer, {n: recipe for n, recipe in recipes.items() if n not in exchanged})
    needed = dict(found.peak_bytes)
    for name, size in exchanged.items():
        needed[placer.device_of(name)] = needed.get(placer.device_of(name), 0) + size
    for name, buffer in placer.model.named_buffers():
        device = placer.device_of(name)
        if device != buffer.device and name not in found.held_bytes:
            needed[device] = needed.get(device, 0) + bytes_of(buffer)
    for device, size in placer.streaming_bytes(found.quantized_bytes).items():
        needed[device] = needed.get(device, 0) + size
    return needed


def report_of(request: Request, recording: Recording, placer: Placer) -> LoadReport:
    """What a load did."""
    pretrained, options = recording.pretrained, request.options
    assert pretrained is not None
    return LoadReport.of(
        recording.model,
        strategy="assign" if options.assigns else "copy",
        reason=options.reason(),
        source=pretrained.label,
        mapped_bytes=placer.mapped_bytes,
        processing=describe_steps(recording.model, recording.requested),
        quantization=quantization(options, pretrained),
        not_quantized={} if placer.quantizer is None else placer.quantizer.not_quantized,
        adapters=tuple(adapter.describe() for adapter in pretrained.adapters),
        notes=(
            *pretrained.notes,
            *warn_of_runtime(pretrained.spec or pretrained.dequantized),
            *recording.notes,
            *notes_on(placer, request.road),
        ),
        revision=pretrained.commit,
    )


def notes_on(placer: Placer, road: Road) -> list[str]:
    """What a report says of values that were placed, by a load on a road."""
    notes = []
    if placer.unseen_bytes:
        notes.append(
            f"{format_bytes(placer.unseen_bytes)} of mapped weights were not read, so not searched "
            "for NaN and infinite values."
        )
    if placer.not_finite:
        notes.append(f"NaN or infinite values in {listed(placer.not_finite)}.")
    if placer.rounded_otherwise and not road.moves_first:
        told = warn_numbers(
            f"Sums in {listed(placer.rounded_otherwise, 3)} were taken on another device than "
            "TransformerLens takes them, in another order: their last bits may differ from its "
            'own. For those, load with device="cpu" and move the model then.'
        )
        notes.append(told)
    return notes


def quantization(options: Options, pretrained: Pretrained) -> str | None:
    """What a load quantizes, or finds quantized, in words; None for neither."""
    if options.quantize is not None:
        return f"{options.quantize.kind}, quantized while loading"
    return None if pretrained.spec is None else f"{pretrained.spec.kind}, as in the checkpoint"
