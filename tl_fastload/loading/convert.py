"""Weights in Hugging Face's naming for a live model: converted and processed by TransformerLens'
own code, on promises, as the model stands.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer
from transformers import PretrainedConfig

from tl_fastload.errors import (
    ArgumentError,
    CheckpointError,
    HalfWrittenError,
    UnsupportedArchitectureError,
)
from tl_fastload.ground.mark import is_half_written
from tl_fastload.ground.words import listed
from tl_fastload.hooked.already import is_processed
from tl_fastload.hooked.architectures import architecture_of
from tl_fastload.hooked.config import load_hf_config
from tl_fastload.hooked.names import is_unread, role
from tl_fastload.hooked.official_names import resolve_model
from tl_fastload.hooked.origin import Origin
from tl_fastload.hooked.processing import Session, record_processing
from tl_fastload.hooked.state_dicts import as_promise
from tl_fastload.hooked.steps import reason_to_skip
from tl_fastload.hooked.stock import convert
from tl_fastload.huggingface import tree
from tl_fastload.huggingface.tree import MissingSource
from tl_fastload.loading import checks
from tl_fastload.loading.sources import WeightSource
from tl_fastload.quantized.assemble import is_quantized
from tl_fastload.quantized.formats import of_checkpoint
from tl_fastload.recipes.evaluate import sources
from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise
from tl_fastload.request.keywords import Keywords
from tl_fastload.request.options import Options
from tl_fastload.request.steps import STEPS
from tl_fastload.source.reader import FileReader


@dataclass
class _Given(Origin):
    """An origin whose weights are at hand: the promises of a table."""

    promises: Mapping[str, Promise] | None = None

    def tree(self, revision: str | None, dtype: Any) -> Any:
        self.is_recording = True
        self.root, self.ledger = tree.tree_from_checkpoint(
            self.promises or {},
            self.hf_config,
            architecture_of(self.hf_config),
            dtype,
            self.spec,
        )
        return self.root


class _Recorder:
    """In front of a HookedTransformer class: what TransformerLens would load is collected."""

    _session: Session

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return self._session.collect(state_dict)

    def fill_missing_keys(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Biases that the architecture does not have are zero, as in a fresh model."""
        return {**_zeros(self, state_dict), **state_dict}

    def setup(self) -> None:
        """The hooks of the model are in place."""


@dataclass
class Converted:
    """What weights in Hugging Face's naming are for a model.

    Attributes:
        recipes: TransformerLens name -> recipe, for all that can be computed.
        determined: the names among them that depend on the weights; the others are zero.
        missing: Hugging Face's names of weights that are not there.
        session: the notes, and what processing takes out of quantized matrices' inputs.
        half_known: TransformerLens name -> the missing ones among several weights it comes from.
        unexpected: keys that the model has no use for.
        problems: what must not be, whether keys may be missing or not.
    """

    recipes: dict[str, Promise]
    determined: set[str]
    missing: list[str]
    session: Session
    half_known: dict[str, list[str]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def find_config(given: Any, weights: WeightSource, model: Any) -> Any:
    """Hugging Face's configuration of some weights: the one that is given, or lies beside them, or
    that the model was loaded with.

    Raises:
        ArgumentError: there is none.
        CheckpointError, UnsupportedArchitectureError: the one that is given cannot be used.
    """
    if isinstance(given, (str, os.PathLike)):
        given = load_hf_config(resolve_model(given).folder, trust_remote_code=False)
    elif given is not None and not isinstance(given, PretrainedConfig):
        raise ArgumentError(
            f"config={given!r} is neither a transformers configuration nor the name of a model."
        )
    found = given or weights.config or _beside(weights.folder) or getattr(model, "_hf_config", None)
    if found is None:
        raise ArgumentError(
            f"No key of {weights.label} is one of TransformerLens'. If they are Hugging Face's, "
            "pass config= (a transformers configuration, or the name or folder of the model): it "
            f"says what they mean. The keys are {listed(sorted(weights.table), 5)}."
        )
    architecture_of(found)
    return found


def _beside(folder: Path | None) -> Any:
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        return load_hf_config(folder, trust_remote_code=False)
    except (CheckpointError, UnsupportedArchitectureError):
        return None


def steps_of(model: Any, asked: Mapping[str, bool] | None) -> dict[str, bool]:
    """The processing steps that make weights what the model's own are.

    Args:
        model: what it was loaded with counts; of a model that tl_fastload did not load, what its
            weights look like.
        asked: steps that the caller decides.

    Raises:
        ArgumentError: a step that does not exist, or that contradicts the model's norms.
    """
    unknown = sorted(set(asked or ()) - set(STEPS))
    if unknown:
        raise ArgumentError(f"processing has {unknown[0]!r}, which is none of {', '.join(STEPS)}.")
    done = getattr(model, "_processed", (None, None))[0]
    if done is None and is_half_written(model) and set(STEPS) - set(asked or ()):
        raise HalfWrittenError(
            "The model is half-written, so its weights do not tell how they were processed. Pass "
            f"processing= with all of {', '.join(STEPS)}."
        )
    flags = {
        step: step in done if done is not None else _looks_processed(model, step) for step in STEPS
    }
    flags.update(asked or {})
    folded = str(model.cfg.normalization_type).endswith("Pre")
    if "fold_ln" in (asked or {}) and flags["fold_ln"] != folded:
        state = "folded" if folded else "with weights of their own"
        raise ArgumentError(
            f"processing={{'fold_ln': {flags['fold_ln']}}} does not fit the model, whose norms are "
            f"{state} ({model.cfg.normalization_type}). Leave fold_ln out, or load the model anew."
        )
    flags["fold_ln"] = folded or (
        flags["fold_ln"] and reason_to_skip("fold_ln", model.cfg) is not None
    )
    checks.check_refactor(model.cfg, flags)
    return flags


@torch.no_grad()
def _looks_processed(model: Any, step: str) -> bool:
    return reason_to_skip(step, model.cfg) is None and is_processed(model, {step: True})


def converted(
    model: Any, weights: WeightSource, hf_config: Any, flags: dict[str, bool], reader: FileReader
) -> Converted:
    """Run TransformerLens' converter and processing on promises of some weights.

    Args:
        model: a HookedTransformer; not changed.
        weights: in Hugging Face's naming.
        hf_config: the configuration that goes with them.
        flags: the processing steps.
        reader: reads their files later.

    Raises:
        MissingWeightsError: TransformerLens' converter cannot go on.
    """
    origin = _origin(model, weights, hf_config, reader)
    session = Session(Options(strategy="copy", progress=False), dict(flags), origin)
    try:
        named = convert(origin, _with_architecture(model.cfg, hf_config))
        shadow: Any = object.__new__(type("Recording", (_Recorder, type(model)), {}))
        shadow.__dict__.update({**model.__dict__, "_session": session})
        stock = HookedTransformer.load_and_process_state_dict.__get__(shadow)
        record_processing(shadow, session, named, flags, stock)
    except Exception as error:
        checks.explain(origin, error, {})
        raise
    session.notes.extend(origin.ledger.notes)
    layers = getattr(getattr(hf_config, "text_config", hf_config), "num_hidden_layers", 0)
    if layers > model.cfg.n_layers:
        session.notes.append(
            f"The weights have {layers} layers, the model {model.cfg.n_layers}: the others were "
            "left out."
        )
    return _sorted_out(model, origin, session)


def _origin(model: Any, weights: WeightSource, hf_config: Any, reader: FileReader) -> _Given:
    promises = {
        name: as_promise(source.tensor, name)
        if isinstance(source, MemorySource)
        else Promise.of(source)
        for name, source in weights.table.items()
    }
    return _Given(
        label=weights.label,
        stock_name="checkpoint/weights",
        official=None,
        is_toy=False,
        hf_config=hf_config,
        hf_model=None,
        location=None,
        keywords=Keywords(),
        reader=reader,
        options=Options(strategy="copy"),
        spec=of_checkpoint(hf_config, weights.label) if is_quantized(promises) else None,
        promises=promises,
    )


def _with_architecture(cfg: Any, hf_config: Any) -> Any:
    if cfg.original_architecture is not None:
        return cfg
    known = copy.copy(cfg)
    known.original_architecture = architecture_of(hf_config)
    return known


def _zeros(model: Any, state_dict: Mapping[str, Any]) -> dict[str, Promise]:
    """Zeros for missing biases, and for the positions of ALiBi models, which no weights tell but
    TransformerLens 2 centres.
    """
    zeros = {}
    for name, parameter in model.named_parameters():
        if name not in state_dict and (role(name).is_bias or is_unread(name, model.cfg)):
            zero = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            zeros[name] = as_promise(zero, name)
    return zeros


def _sorted_out(model: Any, origin: _Given, session: Session) -> Converted:
    """What the recipes determine, what they lack, and what was of no use."""
    given = {
        id(view.source)
        for _, promise in origin.root.named_parameters()
        for view in sources(promise.node)
        if not isinstance(view.source, MissingSource)
    }
    own = dict(model.named_parameters())
    found = Converted({}, set(), sorted({*origin.missing(), *origin.ledger.incomplete}), session)
    for name, promise in session.recipes.items():
        if name not in own:
            continue
        read = [view.source for view in sources(promise.node)]
        lacking = [source.name for source in read if isinstance(source, MissingSource)]
        reads_given = any(id(source) in given for source in read)
        if not lacking:
            found.recipes[name] = promise
            found.determined |= {name} if reads_given else set()
        elif reads_given:
            found.half_known[name] = lacking
    for line in checks.recipe_problems(model, origin, session.recipes):
        kind, _, rest = line.partition(": ")
        if kind in ("unexpected", "no place in HookedTransformer for"):
            found.unexpected.append(rest)
        elif kind not in ("missing", "not complete"):
            found.problems.append(line)
    return found
