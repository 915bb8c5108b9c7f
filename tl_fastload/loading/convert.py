"""Weights in Hugging Face's naming for a live model: converted and processed by TransformerLens'
own code, on promises, as the model stands.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from tl_fastload.errors import ArgumentError, CheckpointError, UnsupportedArchitectureError
from tl_fastload.ground.words import listed
from tl_fastload.huggingface.config import architecture_of, read_config
from tl_fastload.huggingface.pretrained import Pretrained
from tl_fastload.huggingface.tree import MissingSource
from tl_fastload.loading import checks
from tl_fastload.loading.sources import WeightSource
from tl_fastload.placement.own_values import as_promise
from tl_fastload.quantized.recipes import QuantizedSource
from tl_fastload.recipes.evaluate import sources
from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise
from tl_fastload.request.steps import STEPS
from tl_fastload.roads.known import road_of
from tl_fastload.roads.road import Recording, Road
from tl_fastload.source.hub import HubOptions
from tl_fastload.source.location import locate
from tl_fastload.source.reader import FileReader


@dataclass
class Converted:
    """What weights in Hugging Face's naming are for a model.

    Attributes:
        recipes: TransformerLens name -> recipe, for all that can be computed.
        determined: the names among them that depend on the weights; the others are zero.
        missing: Hugging Face's names of weights that are not there.
        recording: what the recipes are written to, the notes, and what processing takes out of
            quantized matrices' inputs.
        half_known: TransformerLens name -> the missing ones among several weights it comes from.
        unexpected: keys that the model has no use for.
        problems: what must not be, whether keys may be missing or not.
    """

    recipes: dict[str, Promise]
    determined: set[str]
    missing: list[str]
    recording: Recording
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
    road = road_of(model)
    if isinstance(given, (str, os.PathLike)):
        folder = locate(given, HubOptions(), aliases=road.aliases()).folder
        given = read_config(folder, road.supported, trust_remote_code=False)
    elif given is not None and not isinstance(given, PretrainedConfig):
        raise ArgumentError(
            f"config={given!r} is neither a transformers configuration nor the name of a model."
        )
    found = given or weights.config or _beside(road, weights.folder) or road.hf_config(model)
    if found is None:
        raise ArgumentError(
            f"No key of {weights.label} is one of TransformerLens'. If they are Hugging Face's, "
            "pass config= (a transformers configuration, or the name or folder of the model): it "
            f"says what they mean. The keys are {listed(sorted(weights.table), 5)}."
        )
    architecture_of(found, road.supported)
    return found


def _beside(road: Road, folder: Path | None) -> Any:
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        return read_config(folder, road.supported, trust_remote_code=False)
    except (CheckpointError, UnsupportedArchitectureError):
        return None


def steps_of(model: Any, asked: Mapping[str, bool] | None) -> dict[str, bool]:
    """The processing steps that make weights what the model's own are.

    Args:
        model: what it was loaded with counts; of a model that tl_fastload did not load, what its
            weights look like.
        asked: steps that the caller decides.

    Raises:
        ArgumentError: a step that does not exist, or that contradicts the model.
        HalfWrittenError: the weights of a half-written model do not tell.
    """
    road = road_of(model)
    unknown = sorted(set(asked or ()) - set(STEPS))
    if unknown:
        raise ArgumentError(f"processing has {unknown[0]!r}, which is none of {', '.join(STEPS)}.")
    flags = road.steps_of(model, asked or {})
    road.check_flags(model.cfg, flags)
    return flags


def converted(
    model: Any,
    weights: WeightSource,
    hf_config: Any,
    flags: dict[str, bool],
    reader: FileReader,
) -> Converted:
    """Run TransformerLens' converter and processing on promises of some weights.

    Args:
        model: not changed.
        weights: in Hugging Face's naming.
        hf_config: the configuration that goes with them.
        flags: the processing steps.
        reader: reads their files later.

    Raises:
        MissingWeightsError: TransformerLens' converter cannot go on.
    """
    road = road_of(model)
    promises = {
        name: as_promise(source.tensor, name)
        if isinstance(source, MemorySource)
        else Promise.of(source)
        for name, source in weights.table.items()
    }
    pretrained = Pretrained.of_weights(weights.label, promises, hf_config, road.supported, reader)
    try:
        recording = road.record_weights(model, pretrained, flags)
    except Exception as error:
        checks.explain(pretrained, error, {})
        raise
    notes = [*pretrained.notes, *recording.notes]
    layers = getattr(getattr(hf_config, "text_config", hf_config), "num_hidden_layers", 0)
    if layers > model.cfg.n_layers:
        notes.append(
            f"The weights have {layers} layers, the model {model.cfg.n_layers}: the others were "
            "left out."
        )
    recording.notes = notes
    return _sorted_out(recording, pretrained)


def _sorted_out(recording: Recording, pretrained: Pretrained) -> Converted:
    """What the recipes determine, what they lack, and what was of no use."""
    given = {
        id(view.source)
        for promise in (pretrained.promises or {}).values()
        for view in sources(promise.node)
    }
    missing = {*pretrained.missing(), *pretrained.ledger.incomplete}
    found = Converted({}, set(), [], recording)
    for name, promise in recording.recipes.items():
        read = [view.source for view in sources(promise.node)]
        lacking = [source.name for source in read if isinstance(source, MissingSource)]
        reads_given = any(id(s) in given or isinstance(s, QuantizedSource) for s in read)
        missing |= set(lacking)
        if not lacking:
            found.recipes[name] = promise
            found.determined |= {name} if reads_given else set()
        elif reads_given:
            found.half_known[name] = lacking
    for line in checks.recipe_problems(recording, pretrained):
        kind, _, rest = line.partition(": ")
        if kind in ("unexpected", f"no place in {road_of(recording.model).name} for"):
            found.unexpected.append(rest)
        elif kind not in ("missing", "not complete"):
            found.problems.append(line)
    found.missing = sorted(missing)
    return found
