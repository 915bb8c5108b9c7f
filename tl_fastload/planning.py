"""Predicts what a load will take, before any weight is read."""

from __future__ import annotations

import logging
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from tl_fastload import advice
from tl_fastload import session as sessions
from tl_fastload.draft import CODE_BYTES, CPU, OBJECTS_BYTES, Draft, Needs, Request
from tl_fastload.errors import NotEnoughMemory
from tl_fastload.forecast import Forecast
from tl_fastload.load_plan import KINDS, LoadPlan
from tl_fastload.stock_memory import StockLedger


def plan_load(request: Request) -> LoadPlan:
    """Predict what a load takes.

    Raises:
        LeanLoadError: what the load itself would raise before it reads weights.
    """
    started = time.perf_counter()
    with _quiet():
        draft = Draft.of(request, StockLedger())
        plan = _plan(draft)
        if not plan.fits_memory:
            plan = replace(plan, advice=tuple(advice.choices(request, draft)))
    return replace(plan, seconds=time.perf_counter() - started)


def with_advice(request: Request, error: NotEnoughMemory) -> NotEnoughMemory:
    """The error with the choices that would fit."""
    with _quiet():
        found = list(advice.choices(request, Draft.of(request)))
    return NotEnoughMemory(f"{error} {advice.as_text(found)}")


def require_room(request: Request) -> None:
    """Raise NotEnoughMemory if a load does not fit; for loads that read weights early."""
    with _quiet():
        draft = Draft.of(request)
        rooms = Needs.of(draft, draft.forecast()).rooms()
    lacking = "; ".join(str(room) for room in rooms if not room.fits)
    if lacking:
        raise NotEnoughMemory(
            f"Loading {draft.origin.label} takes {lacking}. No weights were read."
        )


def _plan(draft: Draft) -> LoadPlan:
    found = draft.forecast()
    needs, stock = Needs.of(draft, found), _Stock.of(draft)
    checkpoint = draft.origin.checkpoint
    missing = checkpoint.missing_bytes if checkpoint is not None else 0
    free = shutil.disk_usage(checkpoint.folder).free if checkpoint is not None and missing else None
    placed = (*found.held_bytes, *found.mapped_bytes)
    return LoadPlan(
        source=draft.origin.label,
        dtype=draft.model.cfg.dtype,
        device=", ".join(sorted({str(draft.placer.device_of(name)) for name in placed})),
        strategy="assign" if draft.session.options.assigns else "copy",
        quantization=sessions.quantization(draft.session),
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
        notes=tuple(draft.origin.notes),
    )


def _by_kind(draft: Draft, found: Forecast) -> dict[str, int]:
    sizes = dict.fromkeys(KINDS, 0)
    for name, parameter in draft.model.named_parameters():
        quantized_bytes = found.quantized_bytes.get(name)
        if quantized_bytes is None:
            sizes[_kind(name)] += _bytes(parameter)
        else:
            sizes["quantized"] += quantized_bytes
    sizes["buffers"] = sum(draft.buffer_bytes().values())
    return sizes


def _kind(name: str) -> str:
    if name.startswith(("embed.", "pos_embed.", "unembed.")):
        return "embedding"
    if ".attn." in name:
        return "attention"
    return "MLP" if ".mlp." in name else "norms and other"


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class _Stock:
    """Stock's peaks, and what they are about if not about this load."""

    host_bytes: int | None = None
    anonymous_bytes: int | None = None
    device_bytes: int | None = None
    note: str | None = None

    @classmethod
    def of(cls, draft: Draft) -> _Stock:
        ledger, options = draft.ledger, draft.origin.options
        if draft.origin.spec is not None or options.dequantize or ledger is None:
            return cls(note="TransformerLens' own loader does not load quantized checkpoints.")
        buffers = sum(draft.buffer_bytes().values())
        device = None
        if any(draft.placer.device_of(name).type != "cpu" for name in draft.recipes):
            # The model is built on the host and moved when it is filled.
            whole = sum(_bytes(parameter) for parameter in draft.model.parameters())
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave TransformerLens' advice on a load to the load itself; other threads still speak."""
    thread = threading.get_ident()
    root = logging.getLogger()

    def is_anothers(record: logging.LogRecord) -> bool:
        return record.thread != thread

    root.addFilter(is_anothers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeFilter(is_anothers)
