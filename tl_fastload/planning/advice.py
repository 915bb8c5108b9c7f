"""What to do about a model that does not fit: the nearest choices that do, each computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from tl_fastload.errors import LeanLoadError, QuantizationError
from tl_fastload.ground.memory_orders import FORWARD
from tl_fastload.placement.rehearsal import Forecast
from tl_fastload.planning.dry_run import Draft, Needs
from tl_fastload.planning.over_devices import over_devices
from tl_fastload.planning.plan import Choice
from tl_fastload.quantized import formats
from tl_fastload.quantized.quantizer import Quantizer
from tl_fastload.report.memory import cuda_is_in_use
from tl_fastload.request.steps import STEPS
from tl_fastload.roads.road import Request

_WIDE = (torch.float32, torch.float64)


def choices(request: Request, draft: Draft) -> Iterator[Choice]:
    """Choices that fit, nearest first: another device, a map over several, mapping, a narrower
    dtype, unprocessed weights that are mapped, quantized weights, fewer layers.

    Args:
        request: the call that does not fit.
        draft: what is known of it.
    """
    for arguments in _devices(request, draft):
        yield from _tried(request, arguments)
    yield from _spread(request)
    mmap = _more_mapping(request, draft)
    if mmap is not None:
        mapped = _drafted(request.with_options(mmap=mmap))
        if mapped is not None:
            yield from _fitting(mapped, {"mmap": mmap}, mapped.forecast())
    narrow: Draft | None = None
    if draft.model.cfg.dtype in _WIDE:
        narrow = _drafted(request.changed(dtype="bfloat16"))
        if narrow is not None:
            yield from _fitting(narrow, {"dtype": "bfloat16"}, narrow.forecast())
    for arguments in _unprocessed(request, draft):
        yield from _tried(request, arguments)
    quantized = list(_quantized(draft, {}))
    if not quantized and narrow is not None:
        quantized = list(_quantized(narrow, {"dtype": "bfloat16"}))
    yield from quantized
    yield from _fewer_layers(draft)


def as_text(found: list[Choice]) -> str:
    """The choices as the end of an error message."""
    if not found:
        text = "No other dtype, quantization or number of layers would fit. "
    else:
        text = "These would fit:" + "".join(f"\n  {choice}" for choice in found) + "\n"
    return f"{text}check_memory=False tries all the same."


def _devices(request: Request, draft: Draft) -> Iterator[dict[str, Any]]:
    if draft.model.cfg.device is not None and "cuda" in str(draft.model.cfg.device):
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if there > request.arguments["n_devices"]:
            yield {"n_devices": there}
        yield {"device": "cpu", "n_devices": 1}
    elif cuda_is_in_use():  # a load onto the CPU does not begin to use it
        yield {"device": "cuda"}


def _spread(request: Request) -> Iterator[Choice]:
    """A map over all devices and the host, with as much on the devices as fits."""
    for arguments, changed in over_devices(request):
        draft = _drafted(changed)
        fitting = [] if draft is None else list(_fitting(draft, arguments, draft.forecast()))
        yield from fitting
        if fitting:
            return


def _more_mapping(request: Request, draft: Draft) -> bool | str | None:
    """A value of `mmap=` that may map more; None without one."""
    if request.options.mmap is False:
        return "auto"
    placer = draft.placer
    gathers = placer.maps is not None and placer.map_any_layout and placer.order == FORWARD
    return True if gathers and not placer.map_gaps else None


def _unprocessed(request: Request, draft: Draft) -> Iterator[dict[str, Any]]:
    """Weights as they lie in the file, which are mapped."""
    checkpoint = draft.pretrained.checkpoint
    if checkpoint is None or not checkpoint.entries or draft.placer.maps is None:
        return
    sizes = Counter[torch.dtype]()
    for entry in checkpoint.entries.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] += entry.nbytes
    arguments: dict[str, Any] = {step: False for step in STEPS if request.arguments[step]}
    stored = sizes.most_common(1)[0][0] if sizes else draft.model.cfg.dtype
    if stored != draft.model.cfg.dtype:
        arguments["dtype"] = str(stored).removeprefix("torch.")
    if arguments:
        yield arguments


def _quantized(draft: Draft, arguments: dict[str, Any]) -> Iterator[Choice]:
    options = draft.request.options
    if draft.pretrained.spec is not None or options.quantize is not None or not options.assigns:
        return
    devices = {draft.placer.device_of(name) for name in draft.recording.recipes}
    for format in formats.FORMATS:
        try:
            for device in devices:
                format.require_device(device)
        except QuantizationError:
            continue
        for kind in format.advised:
            found = draft.forecast(Quantizer(formats.read_quantization(kind), draft.role))
            yield from _fitting(draft, {**arguments, "quantize": kind}, found)


def _fewer_layers(draft: Draft) -> Iterator[Choice]:
    """As many of the first layers as fit."""
    fewest, most = 0, int(draft.model.cfg.n_layers)
    best: list[Choice] = []
    while most - fewest > 1:
        middle = (fewest + most) // 2
        found = draft.forecast(n_layers=middle)
        fitting = list(_fitting(draft, {"first_n_layers": middle}, found, middle))
        if fitting:
            fewest, best = middle, fitting
        else:
            most = middle
    yield from best


def _tried(request: Request, arguments: dict[str, Any]) -> Iterator[Choice]:
    draft = _drafted(request.changed(**arguments))
    if draft is not None:
        yield from _fitting(draft, arguments, draft.forecast())


def _drafted(request: Request) -> Draft | None:
    try:
        request.check()
        return Draft.of(request)
    except LeanLoadError:
        return None  # a choice that this model does not have


def _fitting(
    draft: Draft, arguments: dict[str, Any], found: Forecast, n_layers: int | None = None
) -> Iterator[Choice]:
    needs = Needs.of(draft, found, n_layers)
    if all(room.fits for room in needs.rooms()):
        yield Choice(
            arguments=arguments,
            peak_host_bytes=needs.resident_bytes,
            peak_device_bytes=needs.peak_device_bytes,
            needed_bytes=max(needs.by_device.values()),
            mapped_bytes=sum(found.mapped_bytes.values()),
            streamed_bytes=draft.streamed_bytes(found),
        )
