"""Loads a processed copy: an empty model, whose parameters are mapped from the copy's files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tl_fastload import quantized
from tl_fastload.copies.check import check_asked_for, check_names, check_road, check_steps
from tl_fastload.copies.from_hub import fetch_copy
from tl_fastload.copies.layout import layout_of, moved
from tl_fastload.copies.manifest import (
    Manifest,
    View,
    build_configuration,
    checked_geometry,
    is_copy,
    read_manifest,
    stored_tensors,
)
from tl_fastload.copies.parts import place_parts
from tl_fastload.copies.verify import check_tokenizer, verify_copy
from tl_fastload.errors import CheckpointError
from tl_fastload.ground.geometry import copied
from tl_fastload.ground.own_defaults import own_defaults
from tl_fastload.ground.paths import expanded
from tl_fastload.huggingface.config import hf_config_of
from tl_fastload.huggingface.tokenizer import is_failure, lost_tokenizer, named, read_tokenizer
from tl_fastload.placement.own_values import parameter_versions
from tl_fastload.placement.streaming import put_to_work
from tl_fastload.quantized.spec import warn_of_runtime
from tl_fastload.report.available import check_room, let_go_on_error
from tl_fastload.report.load_report import LoadReport
from tl_fastload.report.memory import PeakSampler, return_freed_memory
from tl_fastload.report.progress import Progress
from tl_fastload.request.keywords import Keywords
from tl_fastload.request.options import Options, is_on_network
from tl_fastload.roads.homes import homes
from tl_fastload.roads.known import describe_steps
from tl_fastload.roads.road import Request
from tl_fastload.shards.load import finish
from tl_fastload.source.choose import stays_inside
from tl_fastload.source.links import leads_out
from tl_fastload.source.reader import FileMaps, FileReader, FileSource
from tl_fastload.source.safetensors import TensorEntry

# Of a copy that other processes save again and again.
_TRIES = 5


def copy_folder(model_name: Any, keywords: Keywords) -> Path | None:
    """The folder of a processed copy that a name means, or None."""
    if not isinstance(model_name, (str, os.PathLike)) or not os.fspath(model_name):
        return None
    subfolder = str(keywords.hub.get("subfolder") or "")
    if not stays_inside(subfolder):
        return None  # the ordinary way says so
    root = expanded(Path(model_name))
    folder = root / subfolder
    return folder if is_copy(folder) and not leads_out(root, subfolder) else None


def load_copy(request: Request, folder: Path) -> Any:
    """Load a processed copy.

    Args:
        request: the call, which has been checked.
        folder: of the copy.

    Raises:
        CheckpointError: the copy is damaged, or this version cannot read it.
        ArgumentError: arguments that contradict what was saved.
    """
    started = time.perf_counter()
    if request.copy_at is not None:
        manifest = read_manifest(folder)
        checked_configuration(manifest, request, folder)  # before gigabytes are downloaded
        fetch_copy(request.copy_at, manifest)
    if request.options.verify:
        verify_copy(folder)
    return_freed_memory()
    reader = FileReader()
    try:
        with torch.inference_mode(False), own_defaults(), PeakSampler() as sampler:
            sampler.mark("placing")
            model, report = _load_whole(request, folder, reader, sampler)
    finally:
        reader.close()
    model.load_report = report.measured(sampler, time.perf_counter() - started)
    return model


def _load_whole(
    request: Request, folder: Path, reader: FileReader, sampler: PeakSampler
) -> tuple[Any, LoadReport]:
    """What `_load` returns; from the beginning if another process saved the copy meanwhile."""
    manifest = read_manifest(folder)
    for _ in range(_TRIES if request.options.mesh is None else 1):
        try:
            found = _load(request, manifest, folder, reader, sampler)
            reader.files.check_all()
            return found
        except (CheckpointError, OSError) as error:
            failed = error
        before, manifest = manifest, read_manifest(folder)
        if manifest.copy_id == before.copy_id:
            break
    if isinstance(failed, CheckpointError):
        raise failed
    raise CheckpointError(
        f"{folder}: the copy could not be read to its end ({failed}). If it was removed or saved "
        "again meanwhile, load it again."
    ) from failed


def _load(
    request: Request,
    manifest: Manifest,
    folder: Path,
    reader: FileReader,
    sampler: PeakSampler,
) -> tuple[Any, LoadReport]:
    options = request.options
    entries = stored_tensors(folder, manifest)
    cfg = checked_configuration(manifest, request, folder)
    hf_config = _hf_config(manifest, request)
    notes = [] if request.copy_at is None else list(request.copy_at.notes)
    model = _build(request, cfg, manifest, hf_config, folder, notes)
    device_of, spread = homes(request, model, lambda: quantized_bytes(manifest, entries))
    check_names(model, manifest, folder)
    if may_map(options, folder):
        reader.maps = FileMaps(reader.files)
    sampler.watch({device_of(name) for name in manifest.parameters})
    sharding = None
    with let_go_on_error(model, manifest.source or manifest.model_class):
        if options.mesh is not None:
            mapped_bytes, sharding = place_parts(
                model, manifest, entries, reader, options, request.road
            )
        else:
            moves = moved(model, manifest, options)
            if options.check_memory:
                _check_room(manifest, entries, reader, device_of, moves)
            mapped_bytes = _place(model, manifest, entries, reader, options, device_of, moves)
        _place_buffers(model, manifest, entries, reader, device_of)
    model = request.road.finished(model)
    if sharding is not None:
        finish(sharding, options, model)
    put_to_work(model, spread)
    model._layout = str(layout_of(manifest, options))
    model._processed = (
        {step for step, on in manifest.flags.items() if on},
        parameter_versions(model),
    )
    model._quantization = manifest.quantization
    model._hf_config = hf_config
    written = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    notes += warn_of_runtime(manifest.quantization)
    notes.append(f"Copy of {manifest.source or manifest.model_class}, written by {written}.")
    notes += [] if spread is None else [spread.describe()]
    report = LoadReport.of(
        model,
        strategy="assign" if options.assigns else "copy",
        reason="a processed copy",
        source=manifest.source or str(folder),
        revision=manifest.revision,
        mapped_bytes=mapped_bytes,
        processing=describe_steps(model, manifest.flags),
        quantization=f"{manifest.quantization.kind}, as saved" if manifest.quantization else None,
        not_quantized=manifest.not_quantized,
        adapters=tuple(manifest.adapters),
        notes=tuple(notes),
    )
    return model, report


def checked_configuration(manifest: Manifest, request: Request, folder: Path) -> Any:
    """The configuration that was saved, with the devices that are asked for.

    Raises:
        ArgumentError: arguments that contradict what was saved.
        CheckpointError: this TransformerLens lacks a field of the configuration.
    """
    check_road(manifest, request, folder)
    cfg = build_configuration(manifest, request.road.config_class, str(folder))
    check_asked_for(manifest, cfg, request, folder)
    check_steps(manifest, cfg, request, folder)
    given = request.arguments["device"]
    cfg.device = given if given is not None else request.road.default_device()
    cfg.n_devices = request.arguments["n_devices"]
    return cfg


def may_map(options: Options, folder: Path) -> bool:
    """Whether the files of a copy are mapped."""
    wanted = options.mmap is True or (options.mmap == "auto" and not is_on_network(folder))
    return wanted and options.assigns


def _hf_config(manifest: Manifest, request: Request) -> Any:
    if manifest.hf_config is None:
        return None
    try:
        return hf_config_of(manifest.hf_config, request.road.supported.names)
    except Exception:  # config classes raise anything for values of another version
        return None  # only `load_weights_` wants it, and says so


def _build(
    request: Request,
    cfg: Any,
    manifest: Manifest,
    hf_config: Any,
    folder: Path,
    notes: list[str],
) -> Any:
    """The empty model, with its tokenizer."""
    arguments, trust = request.arguments, request.keywords.trust_remote_code
    if arguments["default_prepend_bos"] is not None:
        cfg.default_prepend_bos = arguments["default_prepend_bos"]
    side, tokenizer = arguments["default_padding_side"], arguments["tokenizer"]
    if tokenizer is None and manifest.tokenizer is not None:
        side = side or manifest.tokenizer["padding_side"]
        as_named = cfg.tokenizer_name
        tokenizer = _tokenizer(manifest.tokenizer, folder, trust, notes, as_named)
    # Nothing is to be fetched by name, and no seed to be set.
    as_saved = cfg.tokenizer_name, cfg.init_weights
    cfg.tokenizer_name, cfg.init_weights = None, False
    cfg.trust_remote_code = trust  # the caller's, whatever the copy says
    made: dict[str, Any] = {}
    if tokenizer is not None and side is not None:
        made["default_padding_side"] = side

    def build() -> Any:
        found: list[str] = []
        model = request.road.empty_model(
            request,
            cfg,
            found,
            tokenizer,
            hf_config=hf_config,
            built=manifest.built,
            **made,
        )
        notes[:] = [*earlier, *found]
        return model

    earlier = list(notes)
    on_meta = request.options.assigns and manifest.built is None
    model = _build_without_values(build, manifest) if on_meta else None
    model = build() if model is None else model
    cfg.tokenizer_name, cfg.init_weights = as_saved
    return model


def _build_without_values(build: Callable[[], Any], manifest: Manifest) -> Any | None:
    """The empty model on the meta device: computing rotary tables takes longer than all the rest.
    None if it has tensors that the copy does not hold.
    """
    try:
        with torch.device("meta"):
            model = build()
    except (NotImplementedError, RuntimeError):  # a class that looks at values
        return None
    if dict(model.named_buffers()).keys() - manifest.buffers.keys():
        return None
    others = [value for module in model.modules() for value in vars(module).values()]
    return None if any(isinstance(v, torch.Tensor) and v.is_meta for v in others) else model


def _tokenizer(
    saved: dict[str, Any], folder: Path, trust: bool, notes: list[str], as_saved: Any
) -> Any | None:
    check_tokenizer(folder, saved)
    try:
        tokenizer = read_tokenizer(
            folder / saved["folder"],
            use_fast=saved["is_fast"],
            trust_remote_code=trust,
        )
        # Copies of earlier versions do not say what it was called.
        name = saved.get("name", as_saved) or ""
        return named(tokenizer, str(name))
    except BaseException as error:  # a panic of code in Rust is no `Exception`
        if not is_failure(error):
            raise
        notes.append(lost_tokenizer(folder / saved["folder"], error))
        return None


def quantized_bytes(manifest: Manifest, entries: Mapping[str, TensorEntry]) -> dict[str, int]:
    """Bytes of the quantized parameters of a copy."""
    views = manifest.parameters.items()
    return {
        name: sum(entries[key].nbytes for key in view.tensors.values())
        for name, view in views
        if view.quantized is not None
    }


def _place(
    model: nn.Module,
    manifest: Manifest,
    entries: dict[str, TensorEntry],
    reader: FileReader,
    options: Options,
    device_of: Any,
    moves: Mapping[str, tuple[int, ...]],
) -> int:
    """Put every parameter into the model; the bytes of those that are mapped."""
    done: dict[tuple[str, ...], nn.Parameter] = {}
    mapped_bytes = 0
    used = {key for view in manifest.parameters.values() for key in _keys(view)}
    with Progress(options.progress) as progress:
        progress.start(sum(entries[key].nbytes for key in used))
        for name, view in manifest.parameters.items():
            keys = tuple(_keys(view))  # the same ones: the same parameter, under another name
            if keys not in done:
                device, strides = device_of(name), moves.get(name)
                try:
                    if strides is None:
                        tensor = read_tensor(view, entries, reader, device)
                    else:
                        tensor = _read_moved(view, entries, reader, device, strides)
                    done[keys] = _parameter(model, name, tensor, view, options)
                except BaseException:
                    done.clear()  # the traceback holds them as long as the exception lives
                    raise
                size_bytes = sum(entries[key].nbytes for key in keys)
                is_mapped = reader.maps is not None and device.type == "cpu" and strides is None
                mapped_bytes += size_bytes if is_mapped else 0
                progress.advance(name, size_bytes)
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._parameters[leaf] = done[keys]
    return mapped_bytes


def _place_buffers(
    model: nn.Module,
    manifest: Manifest,
    entries: dict[str, TensorEntry],
    reader: FileReader,
    device_of: Any,
) -> None:
    for name, buffer in list(model.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        held = manifest.buffers.get(name)
        if held is not None:
            value = read_tensor(held, entries, reader, device_of(name))
        else:
            value = buffer.to(device_of(name))
        model.get_submodule(parent)._buffers[leaf] = value


def _keys(view: View) -> Iterator[str]:
    yield from view.tensors.values()


def _check_room(
    manifest: Manifest,
    entries: dict[str, TensorEntry],
    reader: FileReader,
    device_of: Any,
    moves: Mapping[str, tuple[int, ...]],
) -> None:
    needed: dict[torch.device, int] = {}
    twice: dict[torch.device, int] = {}
    for name, view in (*manifest.parameters.items(), *manifest.buffers.items()):
        device = device_of(name)
        size = sum(entries[key].nbytes for key in _keys(view))
        if reader.maps is None or device.type != "cpu" or name in moves:
            needed[device] = needed.get(device, 0) + size
        if name in moves:
            twice[device] = max(twice.get(device, 0), size)
    for device, size in twice.items():
        needed[device] += size
    check_room(needed, manifest.source or manifest.model_class)


def _parameter(
    model: nn.Module, name: str, tensor: torch.Tensor, view: View, options: Options
) -> nn.Parameter:
    parent, _, leaf = name.rpartition(".")
    own = model.get_submodule(parent)._parameters[leaf]
    if options.assigns or own is None:
        return nn.Parameter(tensor, requires_grad=view.requires_grad)
    own.data = tensor
    own.requires_grad_(view.requires_grad)
    return own


def read_tensor(
    view: View, entries: dict[str, TensorEntry], reader: FileReader, device: torch.device
) -> torch.Tensor:
    """A parameter or a buffer of a copy: mapped where `reader.maps` is, else read."""
    if view.quantized is None:
        entry = entries[view.tensors[""]]
        return _stored(entry, checked_geometry(view, entry), reader, device)
    parts = {
        part: _stored(entries[key], _whole(entries[key]), reader, device)
        for part, key in view.tensors.items()
    }
    dtype = view.dtype or torch.float32
    return quantized.rebuild(
        parts, view.quantized, view.shape, view.strides, view.offset, dtype, is_parameter=False
    )


def _whole(entry: TensorEntry) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def _stored(
    entry: TensorEntry, geometry: torch.Tensor, reader: FileReader, device: torch.device
) -> torch.Tensor:
    if reader.maps is not None and device.type == "cpu" and entry.nbytes:
        return reader.maps.view(entry, geometry)
    return _read(entry, geometry, reader, device)


def _read(
    entry: TensorEntry, geometry: torch.Tensor, reader: FileReader, device: torch.device
) -> torch.Tensor:
    out = torch.empty_strided(geometry.shape, geometry.stride(), dtype=entry.dtype, device=device)
    FileSource(entry, reader).read_into(out, geometry, ())
    return out


def _read_moved(
    view: View,
    entries: dict[str, TensorEntry],
    reader: FileReader,
    device: torch.device,
    strides: tuple[int, ...],
) -> torch.Tensor:
    entry = entries[view.tensors[""]]
    value = _read(entry, checked_geometry(view, entry), reader, device)
    return copied(value, strides, value.dtype)
