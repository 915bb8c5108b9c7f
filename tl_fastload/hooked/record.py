"""A load as far as it goes without weights: TransformerLens' `from_pretrained`, run to its end on
promises.
"""

from __future__ import annotations

import copy
from typing import Any

from tl_fastload.errors import ArgumentError
from tl_fastload.hooked.answers import Answers
from tl_fastload.hooked.empty import build_empty, build_on_meta
from tl_fastload.hooked.norms import kept_norms
from tl_fastload.hooked.processing import Recorder
from tl_fastload.hooked.steps import check_refactor
from tl_fastload.hooked.stock import run_from_pretrained
from tl_fastload.huggingface.pretrained import Pretrained
from tl_fastload.placement.own_values import parameter_versions
from tl_fastload.request.steps import STEPS
from tl_fastload.roads.observer import Observer
from tl_fastload.roads.road import Recording, Request


def record(
    request: Request,
    pretrained: Pretrained,
    *,
    on_meta: bool = False,
    observer: Observer | None = None,
) -> Recording:
    """As `tl_fastload.roads.road.Road.record`."""
    arguments = {**request.arguments, "move_to_device": False}
    name, _ = arguments.pop("model_name"), arguments.pop("hf_model")
    requested = {step: bool(arguments[step]) for step in STEPS}
    found = Recording(None, requested, pretrained)
    recorder = Recorder(found, observer, quiet=on_meta)
    built: list[Any] = []

    def build(cfg: Any, tokenizer: Any = None, **keywords: Any) -> Any:
        check_refactor(cfg, requested)
        found.notes.extend(kept_norms(cfg, requested))
        pretrained.is_recording = False
        model = _empty(request, pretrained, found, cfg, tokenizer, on_meta=on_meta, **keywords)
        pretrained.is_recording = True
        if observer is not None:
            observer.prepare(model)
        model._recorder = recorder
        built[:] = parameter_versions(model)
        return model

    shown = str(name)
    if shown.lower().startswith(("t5", "bert")):
        shown = f"./{shown}"  # TransformerLens takes such names for other kinds of models
    answers = Answers(pretrained, observer)
    model = run_from_pretrained(answers, build, shown, quiet=on_meta, **arguments)
    pretrained.is_recording = False
    model._recorder = None
    if parameter_versions(model) != built:
        raise ArgumentError(
            f"{type(model).__name__} changes weights in a method of its own while they are being "
            "loaded, before they are there. Change them after from_pretrained has returned."
        )
    model._hf_config = copy.deepcopy(pretrained.config)
    found.model = model
    return found


def _empty(
    request: Request,
    pretrained: Pretrained,
    found: Recording,
    cfg: Any,
    tokenizer: Any,
    *,
    on_meta: bool,
    **keywords: Any,
) -> Any:
    """The model that TransformerLens would make, without values."""
    if on_meta:
        return build_on_meta(request.cls, cfg, found.notes, pretrained.config)
    return build_empty(
        request.cls,
        cfg,
        found.notes,
        tokenizer,
        hf_config=pretrained.config,
        trust_remote_code=pretrained.keywords.trust_remote_code,
        tokenizer_folder=pretrained.tokenizer_folder,
        hub=pretrained.keywords.hub,
        **keywords,
    )
