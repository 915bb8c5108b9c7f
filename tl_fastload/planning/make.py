"""Predicts what a load will take, before any weight is read."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tl_fastload.copies import cache
from tl_fastload.errors import NotEnoughMemory
from tl_fastload.ground.boundary import boundary
from tl_fastload.ground.own_defaults import looking_only, own_defaults
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.ground.words import format_bytes
from tl_fastload.loading.load import quantization
from tl_fastload.placement.rehearsal import Forecast
from tl_fastload.planning import advice, of_copy
from tl_fastload.planning.dry_run import CODE_BYTES, CPU, OBJECTS_BYTES, Draft, Needs
from tl_fastload.planning.plan import KINDS, Choice, LoadPlan, kind_of
from tl_fastload.planning.stock_memory import StockLedger
from tl_fastload.roads.road import Request


def plan_load(request: Request) -> LoadPlan:
    """Predict what a load takes.

    Args:
        request: the call, resolved.

    Raises:
        LeanLoadError: what the load itself would raise before it reads weights.
    """
    started = time.perf_counter()
    with own_defaults():
        entry = cache.entry_for(request)
        mapped = _copy_of(request, entry)
        plan = None if mapped is None else _of_copy(request, *mapped)
        plan = _of_checkpoint(request, entry) if plan is None else plan
    return replace(plan, seconds=time.perf_counter() - started)


def _copy_of(request: Request, entry: Path | None) -> tuple[Request, Path] | None:
    """The processed copy that would be loaded: the one that is named, or the cache's entry."""
    if request.copy is not None:
        return request, request.copy
    if entry is None or not cache.is_usable(entry):
        return None
    return cache.hit_request(request), entry


def _of_copy(request: Request, mapped: Request, folder: Path) -> LoadPlan | None:
    """The plan of a copy; None for a damaged entry, which the load would fill again."""
    try:
        with boundary("while planning"):
            return of_copy.plan_copy(mapped, folder)
    except cache.BAD_ENTRY:
        if mapped is request:
            raise
        return None


def _of_checkpoint(request: Request, entry: Path | None) -> LoadPlan:
    draft = Draft.of(request, StockLedger())
    plan = _plan(draft)
    if entry is not None:
        plan = _with_entry(plan, entry, _entry_bytes(plan, draft))
    return plan if plan.fits_memory else replace(plan, advise=_advise(request, draft))


def _advise(request: Request, draft: Draft) -> Callable[[], tuple[Choice, ...]]:
    def advise() -> tuple[Choice, ...]:
        with own_defaults():
            return tuple(advice.choices(request, draft))

    return advise


def _entry_bytes(plan: LoadPlan, draft: Draft) -> int:
    """What a processed copy takes; the tables that every layer has are written once."""
    tables = {
        (name.rpartition(".")[2], buffer.shape, buffer.dtype): bytes_of(buffer)
        for name, buffer in draft.model.named_buffers()
    }
    return plan.total_bytes - plan.parameter_bytes["buffers"] + sum(tables.values())


def _with_entry(plan: LoadPlan, entry: Path, size: int) -> LoadPlan:
    """The plan with the bytes that filling a cache entry takes on the disk."""
    place = next(path for path in entry.absolute().parents if path.exists())
    room = shutil.disk_usage(place).free
    free = room if plan.available_disk_bytes is None else min(room, plan.available_disk_bytes)
    notes = plan.notes
    if size > room:
        notes = (
            *notes,
            f"The cache entry takes {format_bytes(size)}, {place} has {format_bytes(room)} free: "
            "the model is loaded, and not kept.",
        )
    return replace(
        plan,
        disk_bytes=plan.disk_bytes + size,
        cache_bytes=size,
        available_disk_bytes=free,
        notes=notes,
    )


def with_advice(request: Request, error: NotEnoughMemory) -> NotEnoughMemory:
    """The error with the choices that would fit."""
    with own_defaults():
        mapped = _copy_of(request, cache.entry_for(request))
        if mapped is None:
            found = list(advice.choices(request, Draft.of(request)))
        else:
            found = list(of_copy.choices(*mapped))
    return NotEnoughMemory(f"{error} {advice.as_text(found)}")


def require_room(request: Request) -> None:
    """Raise NotEnoughMemory if a load does not fit; for loads that read weights early."""
    if _copy_of(request, cache.entry_for(request)) is not None:
        return
    with own_defaults():
        draft = Draft.of(request)
        rooms = Needs.of(draft, draft.forecast()).rooms()
    lacking = "; ".join(str(room) for room in rooms if not room.fits)
    if lacking:
        raise NotEnoughMemory(
            f"Loading {draft.pretrained.label} takes {lacking}. No weights were read."
        )


def _plan(draft: Draft) -> LoadPlan:
    found = draft.forecast()
    needs, stock = Needs.of(draft, found), _Stock.of(draft)
    checkpoint = draft.pretrained.checkpoint
    missing = checkpoint.missing_bytes if checkpoint is not None else 0
    free = shutil.disk_usage(checkpoint.folder).free if checkpoint is not None and missing else None
    placed = (*found.held_bytes, *found.mapped_bytes)
    return LoadPlan(
        source=draft.pretrained.label,
        dtype=draft.model.cfg.dtype,
        device=", ".join(sorted({str(draft.placer.device_of(name)) for name in placed})),
        strategy="assign" if draft.request.options.assigns else "copy",
        quantization=quantization(draft.request.options, draft.pretrained),
        parameter_bytes=_by_kind(draft, found),
        mapped_bytes=sum(found.mapped_bytes.values()),
        peak_host_bytes=needs.resident_bytes,
        peak_anonymous_bytes=needs.by_device[CPU],
        peak_device_bytes=needs.peak_device_bytes,
        stock_peak_host_bytes=stock.host_bytes,
        stock_peak_anonymous_bytes=stock.anonymous_bytes,
        stock_peak_device_bytes=stock.device_bytes,
        stock_note=stock.note,
        disk_bytes=missing,
        available_disk_bytes=free,
        rooms=needs.rooms(),
        streamed_bytes=draft.streamed_bytes(found),
        layout=draft.placer.order,
        notes=(*draft.pretrained.notes, *draft.recording.notes),
    )


@looking_only
def _by_kind(draft: Draft, found: Forecast) -> dict[str, int]:
    sizes = dict.fromkeys(KINDS, 0)
    for name, parameter in draft.model.named_parameters():
        quantized_bytes = found.quantized_bytes.get(name)
        if quantized_bytes is None:
            sizes[kind_of(draft.role(name))] += bytes_of(parameter)
        else:
            sizes["quantized"] += quantized_bytes
    sizes["buffers"] = sum(draft.buffer_bytes().values())
    return sizes


@dataclass(frozen=True)
class _Stock:
    """Stock's peaks, and what they are about if not about this load."""

    host_bytes: int | None = None
    anonymous_bytes: int | None = None
    device_bytes: int | None = None
    note: str | None = None

    @classmethod
    def of(cls, draft: Draft) -> _Stock:
        ledger, options = draft.ledger, draft.request.options
        if draft.pretrained.spec is not None or options.dequantize or ledger is None:
            return cls(note="TransformerLens' own loader does not load quantized checkpoints.")
        if not ledger.is_told:
            name = draft.request.road.name
            return cls(note=f"What TransformerLens' own loader of a {name} takes is not predicted.")
        buffers = sum(draft.buffer_bytes().values())
        device = None
        if any(draft.placer.device_of(name).type != "cpu" for name in draft.recording.recipes):
            # The model is built on the host and moved when it is filled.
            whole = sum(bytes_of(parameter) for parameter in draft.model.parameters())
            device = max(ledger.peak_device_bytes, whole) + buffers
        note = None
        if options.quantize is not None:
            note = "TransformerLens' own loader does not quantize: its figures are without."
        rest = OBJECTS_BYTES + buffers
        return cls(
            ledger.peak_host_bytes + CODE_BYTES + rest,
            ledger.peak_anonymous_bytes + rest,
            device,
            note,
        )
