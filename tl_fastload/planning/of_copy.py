"""What loading a processed copy will take, from its JSON and the headers of its files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tl_fastload.copies.check import check_names
from tl_fastload.copies.contents import Places, layout_of, open_copy
from tl_fastload.copies.from_hub import describe_copy
from tl_fastload.copies.manifest import read_manifest
from tl_fastload.copies.read import checked_configuration, may_map
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.planning.dry_run import CODE_BYTES, CPU, OBJECTS_BYTES, Needs
from tl_fastload.planning.over_devices import over_devices
from tl_fastload.planning.plan import KINDS, Choice, LoadPlan, kind_of
from tl_fastload.roads.homes import homes
from tl_fastload.roads.road import Request
from tl_fastload.source.reader import CHUNK_BYTES


def plan_copy(request: Request, folder: Path) -> LoadPlan:
    """Predict what loading a processed copy takes.

    Args:
        request: the call; its arguments must be those that loading the copy takes.
        folder: of the copy.

    Raises:
        ArgumentError, CheckpointError: what loading it would raise.
    """
    at = request.copy_at
    found = open_copy(folder) if at is None else describe_copy(at)
    manifest = found.manifest
    cfg = checked_configuration(manifest, request, folder)
    cfg.init_weights = False  # no seed is to be set
    model = request.road.model_on_meta(request.cls, cfg, manifest.built)
    check_names(model, manifest, folder)
    device_of, spread = homes(request, model, found.quantized_bytes)
    may = may_map(request.options, folder)
    places = Places.of(found, model, request.options, device_of, may_map=may)
    by_kind = dict.fromkeys(KINDS, 0)
    for name, view in found.parameters():
        kind = kind_of(request.road.role(name)) if view.quantized is None else "quantized"
        by_kind[kind] += found.bytes_of(view)
    by_kind["buffers"] += sum(map(found.bytes_of, manifest.buffers.values()))
    streaming: dict[torch.device, int] = {}
    streamed: dict[str, int] = {}
    if spread is not None:
        tensors = (*model.named_parameters(), *model.named_buffers())
        sizes = {name: bytes_of(tensor) for name, tensor in tensors} | found.quantized_bytes()
        streaming, streamed = spread.streaming_bytes(sizes), spread.streamed_bytes(sizes)
    needs = _needs(places.held_bytes(), streaming, reads=request.options.verify)
    plan = LoadPlan(
        source=manifest.source or str(folder),
        dtype=cfg.dtype,
        device=", ".join(sorted({str(device_of(name)) for name in manifest.parameters})),
        strategy="assign" if request.options.assigns else "copy",
        quantization=manifest.as_saved,
        parameter_bytes=by_kind,
        mapped_bytes=places.mapped_bytes(),
        peak_host_bytes=needs.resident_bytes,
        peak_anonymous_bytes=needs.by_device[CPU],
        peak_device_bytes=needs.peak_device_bytes,
        stock_peak_host_bytes=None,
        stock_peak_anonymous_bytes=None,
        stock_peak_device_bytes=None,
        stock_note="TransformerLens' own loader does not load processed copies.",
        disk_bytes=found.missing_bytes,
        available_disk_bytes=shutil.disk_usage(folder).free if found.missing_bytes else None,
        rooms=needs.rooms(),
        streamed_bytes=sum(streamed.values()),
        layout=layout_of(manifest, request.options),
        notes=(
            f"A processed copy: {folder if at is None else at.label}.",
            *(() if spread is None else (spread.describe(),)),
        ),
    )
    if plan.fits_memory:
        return plan
    return replace(plan, advise=lambda: tuple(choices(request, folder)))


def choices(request: Request, folder: Path) -> Iterator[Choice]:
    """Ways to load the same copy that fit: mapped, in the memory order that it has, over several
    devices, or on the host.

    Args:
        request: the call that does not fit.
        folder: of the copy.
    """
    ways: list[tuple[dict[str, Any], Request]] = []
    mapping = request.with_options(mmap="auto", strategy="auto")
    if not may_map(request.options, folder) and may_map(mapping.options, folder):
        ways.append(({"mmap": "auto", "strategy": "auto"}, mapping))
    manifest = read_manifest(folder)
    if layout_of(manifest, request.options) != manifest.layout:
        as_saved = request.with_options(layout=manifest.layout)
        ways.append(({"layout": manifest.layout}, as_saved))
    ways += over_devices(request)
    if request.options.device_map is None:
        ways.append(({"device": "cpu", "n_devices": 1}, request.changed(device="cpu", n_devices=1)))
    is_spread = False
    for arguments, changed in ways:
        if is_spread and "device_map" in arguments:
            continue  # the first of these is enough
        plan = plan_copy(changed, folder)
        if plan.fits_memory:
            is_spread = is_spread or "device_map" in arguments
            yield Choice(
                arguments=arguments,
                peak_host_bytes=plan.peak_host_bytes,
                peak_device_bytes=plan.peak_device_bytes,
                needed_bytes=max(room.needed_bytes for room in plan.rooms),
                mapped_bytes=plan.mapped_bytes,
                streamed_bytes=plan.streamed_bytes,
            )


def _needs(
    held: dict[torch.device, int], streaming: dict[torch.device, int], *, reads: bool
) -> Needs:
    """What a load holds at most.

    Args:
        held: from `Places.held_bytes`.
        streaming: what parts that run elsewhere than they lie take there.
        reads: whether every byte is read once, to be compared with its checksum.
    """
    others = {device: size for device, size in held.items() if device.type != "cpu"}
    for device, size in streaming.items():
        others[device] = others.get(device, 0) + size
    host = OBJECTS_BYTES + sum(size for d, size in held.items() if d.type == "cpu")
    host += CHUNK_BYTES if reads or others else 0
    return Needs({CPU: host, **others}, host + CODE_BYTES)
