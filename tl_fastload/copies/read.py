"""Loads a processed copy: an empty model, whose parameters are mapped from the copy's files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tl_fastload.copies.check import check_asked_for, check_names, check_road, check_steps
from tl_fastload.copies.contents import Contents, Places, layout_of, opened
from tl_fastload.copies.from_hub import fetch_copy
from tl_fastload.copies.manifest import (
    Manifest,
    build_configuration,
    is_copy,
    read_manifest,
    stored_tensors,
)
from tl_fastload.copies.parts import place_parts
from tl_fastload.copies.verify import check_tokenizer, verify_copy
from tl_fastload.ground.own_defaults import own_defaults
from tl_fastload.ground.paths import expanded
from tl_fastload.huggingface.config import hf_config_of
from tl_fastload.huggingface.tokenizer import is_failure, lost_tokenizer, named, read_tokenizer
from tl_fastload.placement.own_values import parameter_versions
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
from tl_fastload.source.reader import FileMaps, FileReader


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
            model, report = opened(
                folder,
                lambda manifest: _load(request, manifest, folder, reader, sampler),
                again=request.options.mesh is None,
            )
    finally:
        reader.close()
    model.load_report = report.measured(sampler, time.perf_counter() - started)
    return model


def _load(
    request: Request,
    manifest: Manifest,
    folder: Path,
    reader: FileReader,
    sampler: PeakSampler,
) -> tuple[Any, LoadReport]:
    options = request.options
    contents = Contents(manifest, stored_tensors(folder, manifest))
    cfg = checked_configuration(manifest, request, folder)
    hf_config = _hf_config(manifest, request)
    model, notes = _build(request, cfg, manifest, hf_config, folder)
    device_of, spread = homes(request, model, contents.quantized_bytes)
    shared = None if options.mesh is None else request.road.shared(model)
    check_names(model, manifest, folder, () if shared is None else shared.views)
    if may_map(options, folder):
        reader.maps = FileMaps(reader.files)
    sampler.watch({device_of(name) for name in manifest.parameters})
    label, sharding = manifest.source or manifest.model_class, None
    with let_go_on_error(model, label):
        if options.mesh is not None:
            mapped_bytes, sharding = place_parts(model, contents, reader, request)
        else:
            may = reader.maps is not None
            places = Places.of(contents, model, options, device_of, may_map=may)
            if options.check_memory:
                check_room(places.held_bytes(), label)
            _place(model, places, reader, options)
            mapped_bytes = places.mapped_bytes()
        _place_buffers(model, contents, reader, device_of)
    reader.files.check_all()
    model = request.road.finished(model, device_of)
    if sharding is not None:
        finish(sharding, options)
    request.road.put_to_work(model, spread)
    model._layout = str(layout_of(manifest, options))
    model._processed = (
        {step for step, on in manifest.flags.items() if on},
        parameter_versions(model),
    )
    model._quantization = manifest.quantization
    model._hf_config = hf_config
    written = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    notes += [*warn_of_runtime(manifest.quantization), f"Copy of {label}, written by {written}."]
    notes += [] if spread is None else [spread.describe()]
    report = LoadReport.of(
        model,
        strategy="assign" if options.assigns else "copy",
        reason="a processed copy",
        source=manifest.source or str(folder),
        revision=manifest.revision,
        mapped_bytes=mapped_bytes,
        processing=describe_steps(model, manifest.flags),
        quantization=manifest.as_saved,
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
    request: Request, cfg: Any, manifest: Manifest, hf_config: Any, folder: Path
) -> tuple[Any, list[str]]:
    """The empty model, with its tokenizer; and what the report says of it."""
    arguments, trust = request.arguments, request.keywords.trust_remote_code
    notes = [] if request.copy_at is None else list(request.copy_at.notes)
    if arguments["default_prepend_bos"] is not None:
        cfg.default_prepend_bos = arguments["default_prepend_bos"]
    side, tokenizer = arguments["default_padding_side"], arguments["tokenizer"]
    if tokenizer is None and manifest.tokenizer is not None:
        side = side or manifest.tokenizer["padding_side"]
        tokenizer = _tokenizer(manifest.tokenizer, folder, trust, notes, cfg.tokenizer_name)
    # Nothing is to be fetched by name, and no seed to be set.
    as_saved = cfg.tokenizer_name, cfg.init_weights
    cfg.tokenizer_name, cfg.init_weights = None, False
    cfg.trust_remote_code = trust  # the caller's, whatever the copy says
    more: dict[str, Any] = {"hf_config": hf_config, "built": manifest.built}
    if tokenizer is not None and side is not None:
        more["default_padding_side"] = side

    def build() -> tuple[Any, list[str]]:
        found: list[str] = []
        return request.road.empty_model(request, cfg, found, tokenizer, **more), found

    on_meta = request.options.assigns and manifest.built is None
    made = _build_without_values(build, manifest) if on_meta else None
    model, found = made or build()
    cfg.tokenizer_name, cfg.init_weights = as_saved
    return model, [*notes, *found]


def _build_without_values(
    build: Callable[[], tuple[Any, list[str]]], manifest: Manifest
) -> tuple[Any, list[str]] | None:
    """The empty model on the meta device: computing rotary tables takes longer than all the rest.
    None if it has tensors that the copy does not hold.
    """
    try:
        with torch.device("meta"):
            model, notes = build()
    except (NotImplementedError, RuntimeError):  # a class that looks at values
        return None
    if dict(model.named_buffers()).keys() - manifest.buffers.keys():
        return None
    others = [value for module in model.modules() for value in vars(module).values()]
    has_more = any(isinstance(v, torch.Tensor) and v.is_meta for v in others)
    return None if has_more else (model, notes)


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


def _place(model: nn.Module, places: Places, reader: FileReader, options: Options) -> None:
    """Put every parameter into the model."""
    contents = places.contents
    done: dict[tuple[str, ...], nn.Parameter] = {}
    with Progress(options.progress) as progress:
        progress.start(sum(contents.bytes_of(view) for _, view in contents.parameters()))
        for name, view in contents.manifest.parameters.items():
            parent, _, leaf = name.rpartition(".")
            slots = model.get_submodule(parent)._parameters
            keys = tuple(view.tensors.values())  # the same ones: the same parameter, once more
            if keys not in done:
                try:
                    device, strides = places.device_of(name), places.moves.get(name)
                    own: Any = slots[leaf]
                    tensor = contents.tensor(view, reader, device, strides)
                    if options.assigns or own is None:
                        done[keys] = nn.Parameter(tensor, requires_grad=view.requires_grad)
                    else:
                        own.data = tensor
                        done[keys] = own.requires_grad_(view.requires_grad)
                except BaseException:
                    done.clear()  # the traceback holds them as long as the exception lives
                    raise
                progress.advance(name, contents.bytes_of(view))
            slots[leaf] = done[keys]


def _place_buffers(
    model: nn.Module,
    contents: Contents,
    reader: FileReader,
    device_of: Callable[[str], torch.device],
) -> None:
    for name, buffer in list(model.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        held, device = contents.manifest.buffers.get(name), device_of(name)
        value = buffer.to(device) if held is None else contents.tensor(held, reader, device)
        model.get_submodule(parent)._buffers[leaf] = value
