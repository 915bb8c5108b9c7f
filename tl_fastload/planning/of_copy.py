"""What loading a processed copy will take, from its JSON and the headers of its files."""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tl_fastload.copies.check import check_names
from tl_fastload.copies.from_hub import Description, describe_copy
from tl_fastload.copies.layout import layout_of, moved
from tl_fastload.copies.manifest import Manifest, View, read_manifest
from tl_fastload.copies.read import checked_configuration, may_map, quantized_bytes
from tl_fastload.copies.verify import open_copy
from tl_fastload.ground.role import RoleOf
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.planning.dry_run import CODE_BYTES, CPU, OBJECTS_BYTES, Needs
from tl_fastload.planning.plan import KINDS, Choice, LoadPlan, kind_of
from tl_fastload.roads.homes import homes
from tl_fastload.roads.road import Request
from tl_fastload.source.reader import CHUNK_BYTES
from tl_fastload.source.safetensors import TensorEntry


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the parts of a copy.

    Attributes:
        by_kind: the whole model, by `KINDS`.
        mapped: of parameters that are mapped.
        held: of the parameters and buffers that are read, on each device.
        twice: of the largest parameter on each device that is put into another memory order.
    """

    by_kind: dict[str, int]
    mapped: int
    held: dict[torch.device, int]
    twice: dict[torch.device, int]


def plan_copy(request: Request, folder: Path) -> LoadPlan:
    """Predict what loading a processed copy takes.

    Args:
        request: the call; its arguments must be those that loading the copy takes.
        folder: of the copy.

    Raises:
        ArgumentError, CheckpointError: what loading it would raise.
    """
    found = _described(request, folder)
    manifest, entries = found.manifest, found.entries
    cfg = checked_configuration(manifest, request, folder)
    cfg.init_weights = False  # no seed is to be set
    model = request.road.model_on_meta(request.cls, cfg, manifest.built)
    check_names(model, manifest, folder)
    quantized = quantized_bytes(manifest, entries)
    device_of, spread = homes(request, model, lambda: quantized)
    moves = moved(model, manifest, request.options)
    mapped = may_map(request.options, folder)
    role = request.road.role
    sizes = _sizes(manifest, entries, role, device_of, moves, is_mapped=mapped)
    streaming: dict[torch.device, int] = {}
    if spread is not None:
        tensors = (*model.named_parameters(), *model.named_buffers())
        dense = {name: bytes_of(tensor) for name, tensor in tensors}
        streaming = spread.streaming_bytes({**dense, **quantized})
    needs = _needs(sizes, streaming, reads=request.options.verify)
    kind = None if manifest.quantization is None else f"{manifest.quantization.kind}, as saved"
    plan = LoadPlan(
        source=manifest.source or str(folder),
        dtype=cfg.dtype,
        device=", ".join(sorted({str(device_of(name)) for name in manifest.parameters})),
        strategy="assign" if request.options.assigns else "copy",
        quantization=kind,
        parameter_bytes=sizes.by_kind,
        mapped_bytes=sizes.mapped,
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
        layout=layout_of(manifest, request.options),
        notes=(
            f"A processed copy: {folder if request.copy_at is None else request.copy_at.label}.",
            *(() if spread is None else (spread.describe(),)),
        ),
    )
    if plan.fits_memory:
        return plan
    return replace(plan, advise=lambda: tuple(choices(request, folder)))


def _described(request: Request, folder: Path) -> Description:
    if request.copy_at is not None:
        return describe_copy(request.copy_at)
    return Description(*open_copy(folder), missing_bytes=0)


def choices(request: Request, folder: Path) -> Iterator[Choice]:
    """Ways to load the same copy that fit: mapped, in the memory order that it has, or on the host.

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
    ways.append(({"device": "cpu", "n_devices": 1}, request.changed(device="cpu", n_devices=1)))
    for arguments, changed in ways:
        plan = plan_copy(changed, folder)
        if plan.fits_memory:
            yield Choice(
                arguments=arguments,
                peak_host_bytes=plan.peak_host_bytes,
                peak_device_bytes=plan.peak_device_bytes,
                needed_bytes=max(room.needed_bytes for room in plan.rooms),
                mapped_bytes=plan.mapped_bytes,
            )


def _sizes(
    manifest: Manifest,
    entries: dict[str, TensorEntry],
    role: RoleOf,
    device_of: Any,
    moves: Container[str],
    *,
    is_mapped: bool,
) -> _Sizes:
    sizes = _Sizes(dict.fromkeys(KINDS, 0), 0, {}, {})
    mapped = 0

    def place(name: str, view: View) -> int:
        """The bytes of a tensor; counted where they go, unless they are mapped."""
        size = sum(entries[key].nbytes for key in view.tensors.values())
        device = device_of(name)
        if name in moves:
            sizes.twice[device] = max(sizes.twice.get(device, 0), size)
        elif is_mapped and device.type == "cpu":
            return size
        sizes.held[device] = sizes.held.get(device, 0) + size
        return size

    done: set[tuple[str, ...]] = set()
    for name, view in manifest.parameters.items():
        keys = tuple(view.tensors.values())
        if keys in done:  # the same parameter, under another name
            continue
        done.add(keys)
        size = place(name, view)
        is_read = name in moves or device_of(name).type != "cpu"
        mapped += size if is_mapped and not is_read else 0
        sizes.by_kind[kind_of(role(name)) if view.quantized is None else "quantized"] += size
    for name, view in manifest.buffers.items():
        sizes.by_kind["buffers"] += place(name, view)
    return replace(sizes, mapped=mapped)


def _needs(sizes: _Sizes, streaming: dict[torch.device, int], *, reads: bool) -> Needs:
    """What a load of these sizes holds at most.

    Args:
        sizes: from `_sizes`.
        streaming: what parts that run elsewhere than they lie take there.
        reads: whether every byte is read once, to be compared with its checksum.
    """
    held = {device: size + sizes.twice.get(device, 0) for device, size in sizes.held.items()}
    others = {device: size for device, size in held.items() if device.type != "cpu"}
    for device, size in streaming.items():
        others[device] = others.get(device, 0) + size
    host = OBJECTS_BYTES + sum(size for d, size in held.items() if d.type == "cpu")
    host += CHUNK_BYTES if reads or others else 0
    return Needs({CPU: host, **others}, host + CODE_BYTES)
