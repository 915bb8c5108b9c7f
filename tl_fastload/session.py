"""One load, from a name to a placed model: the order of events, and what is checked before the next."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from tl_fastload import compat, steps, verify
from tl_fastload.errors import ArgumentError, MissingWeightsError
from tl_fastload.memory import PeakSampler, collect_and_return, unique_bytes
from tl_fastload.options import Options
from tl_fastload.origin import Origin, find_origin, is_promise
from tl_fastload.placement import Placer
from tl_fastload.progress import Progress
from tl_fastload.promise import MemorySource, Promise
from tl_fastload.reader import FileMaps, FileReader
from tl_fastload.report import LoadReport
from tl_fastload.skeleton import build_empty, device_map
from tl_fastload.stock import run_from_pretrained

__all__ = ["Options", "Session", "load"]


@dataclass
class Session:
    """State of one load.

    Attributes:
        options: strategy, mapping, progress.
        requested: the processing steps that the caller asked for.
        origin: where the weights come from; None for a state dict.
        recipes: parameter name -> recipe, collected from TransformerLens' own `load_state_dict` calls.
        place_in_memory: write into the model's tensors instead of replacing them.
        notes: for the report.
    """

    options: Options
    requested: dict[str, bool]
    origin: Optional[Origin] = None
    recipes: dict[str, Promise] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    mapped_bytes: int = 0

    def collect(self, state_dict: dict[str, Any]) -> _IncompatibleKeys:
        """Take what TransformerLens would load; it is placed when all of it is known."""
        self.recipes.update(state_dict)
        return _IncompatibleKeys([], [])


def load(
    cls: type, options: Options, arguments: dict[str, Any], keywords: dict[str, Any]
) -> Any:
    """Load a model.

    Args:
        cls: the model class, with `LeanLoadingMixin` among its bases.
        options: strategy, mapping, progress.
        arguments: of `from_pretrained`.
        keywords: for Hugging Face.
    """
    started = time.perf_counter()
    options.check()
    verify.check_arguments(arguments, keywords)
    reader = FileReader(may_map=options.mmap is not False)
    model_name, hf_model = arguments.pop("model_name"), arguments.pop("hf_model")
    dtype_keyword = {k: keywords.pop(k) for k in ("torch_dtype",) if k in keywords}
    try:
        with PeakSampler() as sampler:
            origin = find_origin(model_name, hf_model, keywords, reader)
            session = Session(options, {s: bool(arguments[s]) for s in steps.STEPS}, origin)
            move = arguments.pop("move_to_device")

            def build(cfg: Any, *args: Any, **kwargs: Any) -> Any:
                model = build_empty(cls, cfg, origin, session.notes, *args, **kwargs)
                model._session = session
                session.options.move_to_device = move
                return model

            model = run_from_pretrained(
                origin, build, str(model_name), move_to_device=False, **arguments, **dtype_keyword
            )
            model._session = None
            origin.root = None
            del origin.reader
    finally:
        reader.close()
    collect_and_return()
    model.load_report = _report(model, session, sampler, time.perf_counter() - started)
    return model


def load_state_dict_into(
    model: Any, state_dict: dict[str, Any], flags: dict[str, bool], stock: Callable[..., None]
) -> None:
    """Run TransformerLens' `load_and_process_state_dict` on promises, then place what it would have loaded.

    Args:
        model: the model to fill.
        state_dict: TransformerLens names -> tensors or promises; not changed.
        flags: the processing steps.
        stock: the model's own bound `load_and_process_state_dict`.
    """
    session: Optional[Session] = model._session
    if session is not None:
        _process(model, session, state_dict, flags, stock)
        _place(model, session)
        return
    started = time.perf_counter()
    session = Session(Options(strategy="copy"), dict(flags))
    verify.check_state_dict(model, state_dict)
    model._session = session
    try:
        with PeakSampler() as sampler:
            _process(model, session, state_dict, flags, stock)
            _place(model, session)
    finally:
        model._session = None
    collect_and_return()
    model.load_report = _report(model, session, sampler, time.perf_counter() - started)
    model._processed = _fingerprint(model, flags)


def _process(
    model: Any,
    session: Session,
    state_dict: dict[str, Any],
    flags: dict[str, bool],
    stock: Callable[..., None],
) -> None:
    promises = {
        name: value if is_promise(value) else Promise.of(MemorySource(value, name), value.device)
        for name, value in state_dict.items()
        if isinstance(value, torch.Tensor)
    }
    allowed = dict(flags)
    if steps.reason_to_skip("fold_value_biases", model.cfg) is not None:
        # TransformerLens folds all the same, which changes the model's output.
        allowed["fold_value_biases"] = False
    stock(promises, **allowed)
    if session.origin is not None:
        verify.check_recipes(model, session.origin, session.recipes)


def _place(model: nn.Module, session: Session) -> None:
    options = session.options
    device_of = device_map(model, options.move_to_device)
    maps = None
    if session.origin is not None and options.may_map(session.origin.checkpoint):
        maps = FileMaps()
    with Progress(options.progress) as progress:
        placer = Placer(
            model,
            device_of,
            assign=options.assigns,
            maps=maps,
            map_any_layout=not any(session.requested.values()),
            progress=progress,
        )
        placer.place(session.recipes)
    session.mapped_bytes = placer.mapped_bytes
    session.recipes = {}
    if placer.not_finite:
        session.notes.append(f"NaN or infinite values in {_listed(placer.not_finite)}.")
    for name, buffer in model.named_buffers():
        _move_buffer(model, name, buffer, device_of(name))


def _move_buffer(model: nn.Module, name: str, buffer: torch.Tensor, device: torch.device) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._buffers[leaf] = buffer.to(device)


def fill_missing_keys(model: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Complete a state dict with what the model has by default: zero biases, unit norms, its buffers.

    Raises:
        MissingWeightsError: a weight matrix is missing; TransformerLens would go on with uninitialised memory.
    """
    own = model.state_dict(keep_vars=True)
    missing = [name for name in own if name not in state_dict]
    lost = [name for name in missing if "W_" in name.rsplit(".", 2)[-1] or _is_matrix(own[name], name)]
    if getattr(model.cfg, "positional_embedding_type", None) == "alibi" and "pos_embed.W_pos" in lost:
        # ALiBi models have no position embedding; TransformerLens never reads this parameter.
        lost.remove("pos_embed.W_pos")
        with torch.no_grad():
            own["pos_embed.W_pos"].zero_()
    if lost:
        raise MissingWeightsError(
            f"The weights lack {_listed(lost)}. Nothing was loaded. Check that the checkpoint is complete and of "
            "this architecture."
        )
    complete = dict(state_dict)
    for name in missing:
        complete[name] = Promise.of(MemorySource(own[name], name), own[name].device)
    return complete


def _is_matrix(tensor: torch.Tensor, name: str) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.dim() > 1 and not name.rsplit(".", 1)[-1].startswith(("b_", "_b_"))


def is_already_processed(model: Any, flags: dict[str, bool]) -> bool:
    """Whether these steps were done and no parameter has changed since; notes it in the report if so."""
    before = getattr(model, "_processed", None)
    if before is None or before != _fingerprint(model, {**before[0], **_asked(flags)}):
        return False
    report = model.load_report
    note = "process_weights_ was called again with nothing changed: nothing was done."
    object.__setattr__(report, "notes", (*report.notes, note))
    return True


def _asked(flags: dict[str, bool]) -> dict[str, bool]:
    return {name: True for name, value in flags.items() if value}


def _fingerprint(model: nn.Module, flags: dict[str, bool]) -> tuple[Any, ...]:
    versions = tuple((name, id(p), p.data_ptr(), p._version) for name, p in model.named_parameters())
    return (_asked(flags), versions)


def _report(model: Any, session: Session, sampler: PeakSampler, seconds: float) -> LoadReport:
    origin = session.origin
    parameters = list(model.parameters())
    devices = sorted({str(parameter.device) for parameter in parameters})
    model._processed = _fingerprint(model, session.requested)
    return LoadReport(
        strategy="assign" if session.options.assigns else "copy",
        reason=session.options.reason(),
        torch_version=str(compat.TORCH),
        transformers_version=str(compat.TRANSFORMERS),
        transformer_lens_version=str(compat.TRANSFORMER_LENS),
        source=origin.label if origin is not None else "state_dict",
        dtype=model.cfg.dtype,
        device=", ".join(devices),
        seconds=seconds,
        parameter_bytes=unique_bytes(parameters),
        peak_host_bytes=sampler.peak_host_bytes,
        peak_anonymous_bytes=sampler.peak_anonymous_bytes,
        mapped_bytes=session.mapped_bytes,
        peak_device_bytes=sampler.peak_device_bytes,
        processing=steps.describe(session.requested, model.cfg),
        notes=tuple([*(origin.notes if origin is not None else ()), *session.notes]),
    )


def _listed(names: list[str], most: int = 10) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
