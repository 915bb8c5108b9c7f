"""Weights into a model that is there already: tensor by tensor, in place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tl_fastload.errors import (
    ArgumentError,
    MissingWeightsError,
    QuantizationError,
)
from tl_fastload.ground.boundary import guarded
from tl_fastload.ground.own_defaults import own_defaults
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.ground.words import listed
from tl_fastload.ground.wrappers import named_as, own_names, unwrapped, without_wrapper_parts
from tl_fastload.loading.convert import Converted, converted, find_config, steps_of
from tl_fastload.loading.live import write_recipes
from tl_fastload.loading.sources import WeightSource, open_source, read_through
from tl_fastload.placement.half_written import InPlaceStep, require_cover
from tl_fastload.placement.own_values import parameter_versions, table_problem
from tl_fastload.placement.values_here import require_values
from tl_fastload.placement.writer import InPlaceWriter, Write
from tl_fastload.quantized import QuantizedTensor, views
from tl_fastload.quantized.quantizer import Quantizer
from tl_fastload.recipes.nodes import MemorySource, Source
from tl_fastload.recipes.promise import Promise
from tl_fastload.report.load_report import LoadReport
from tl_fastload.report.memory import PeakSampler, return_freed_memory
from tl_fastload.report.progress import Progress, ProgressOption
from tl_fastload.request.argument_types import checked
from tl_fastload.roads.known import describe_steps, road_of
from tl_fastload.source.reader import FileReader


@dataclass
class _Found:
    """What fits and what does not, before anything is written."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    flags: dict[str, bool] | None = None

    def check(self, label: str, strict: bool, fitting: int) -> None:
        """Raise MissingWeightsError if the weights must not be loaded."""
        lines = list(self.problems)
        if strict:
            lines += [f"missing: {name}" for name in self.missing]
            lines += [f"unexpected: {name}" for name in self.unexpected]
        if not lines and self.unexpected and not fitting:
            lines = [f"no key fits: {listed(self.unexpected)}"]
        if lines:
            raise MissingWeightsError(
                f"The weights of {label} do not fit the model, which is as it was:\n  "
                + "\n  ".join([*lines, *self.notes])
            )


@guarded("while loading weights into a model")
def load_weights_(
    model: Any,
    source: Any,
    strict: bool = True,
    *,
    config: Any = None,
    processing: Mapping[str, bool] | None = None,
    progress: ProgressOption = False,
) -> LoadReport:
    """Load weights into a model that exists, in place, one tensor at a time.

    Parameters keep their identity, device, dtype, strides, `requires_grad` and `grad`, so that
    optimizers and compiled code go on with them. At most one parameter's worth of extra memory is
    held. Everything that does not fit is found, and every file read through once, before the first
    byte changes.

    Args:
        model: a HookedTransformer or a TransformerBridge, loaded by tl_fastload or not; compiled or
            parallel is fine.
        source: a state dict, on any devices and in any floating dtypes, the model's own tensors
            among them; a model, which stands for its state dict; the path of a safetensors file, of
            a torch file (read with `weights_only=True`), of an index, of a folder, or of a
            processed copy (`save_lean`), whose weights go in as they are. Keys are Hugging Face's,
            or for a HookedTransformer TransformerLens' (a bridge's state dict lacks weights: pass
            the bridge, or a copy of it); `_orig_mod.`, `module.` or an attribute's name in front of
            them is taken off where the rest fits.
        strict: whether weights may neither be missing nor unexpected. Tables that TransformerLens
            computes (masks, rotary embeddings) and biases that the architecture does not have may
            always be missing. Shapes must fit in any case.
        config: for Hugging Face's naming: the configuration (an object, a folder, a name) of the
            weights. By default the one beside the files, or the one that the model was loaded
            with.
        processing: for Hugging Face's naming: step -> whether to do it, where the default is not
            wanted. Weights are processed as the model's own were.
        progress: as for `from_pretrained_lean`.

    Returns:
        The report, which is also `model.load_report` of a lean model; `missing_keys` and
        `unexpected_keys` say what was left out with `strict=False`.

    Raises:
        MissingWeightsError: missing, unexpected or misshapen keys, all of them.
        CheckpointError: files that cannot be read.
        HalfWrittenError: files were changed, or a device failed, after they had been read through:
            the model then is a mixture, and says so until all of its weights are loaded again. So
            it does after an interrupt (Ctrl-C), which goes on as it is. Also if these weights would
            not make a model whole that was left so.
        NotEnoughMemory: memory ran out in the middle; likewise.
        QuantizationError: dense weights for quantized parameters, or another kind.
        ArgumentError: no model of TransformerLens', no source, weights of another class or state,
            or no configuration to be found; or parameters whose values are elsewhere (offloaded,
            sharded, on meta).
    """
    started = time.perf_counter()
    checked(strict=strict, processing=processing)
    checked(**dict(processing or {}))
    model = unwrapped(model)
    road = road_of(model)
    require_values(model, "load_weights_")
    held = road.stored(model)
    reader = FileReader()
    try:
        with (
            torch.inference_mode(False),
            own_defaults(),
            PeakSampler() as sampler,
            Progress(progress) as bar,
        ):
            sampler.watch({parameter.device for parameter in model.parameters()})
            weights = open_source(source, reader)
            _check_source(weights, model, held)
            named, renaming = named_as(held, weights.table, road.folded_names(model))
            if renaming.ambiguous is not None:
                raise MissingWeightsError(
                    f"The keys of {weights.label} fit the model only without what stands in front "
                    f"of them, and {renaming.ambiguous}. The model is as it was. Pass the keys of "
                    "one model."
                )
            if _is_own_naming(weights, named, held):
                if processing is not None:
                    raise ArgumentError(
                        "processing= is for weights in Hugging Face's naming. These have "
                        "TransformerLens' names and go in as they are; to process them, call "
                        "model.load_and_process_state_dict."
                    )
                found = _load_as_named(
                    *(model, held, weights, named, [*renaming.notes], strict, reader, bar)
                )
            else:
                found = _load_converted(model, weights, config, processing, strict, reader, bar)
    finally:
        reader.close()
    report = _report(model, weights, found, sampler, time.perf_counter() - started)
    if hasattr(model, "_road"):  # of the lean classes
        model.load_report = report
    return report


def _is_own_naming(weights: WeightSource, named: Mapping[str, Source], held: Any) -> bool:
    """Whether weights have the names that TransformerLens gives those of a model."""
    if weights.road is not None or hasattr(held, "built"):
        return weights.road is not None
    own, road = own_names(held), road_of(held)
    return not named or any(name in own or road.role(name).is_folded for name in named)


def _check_source(weights: WeightSource, model: Any, held: Any) -> None:
    """Raise ArgumentError for weights of another class, or processed where the model's are not."""
    road = road_of(model)
    if weights.road not in (None, road.name):
        raise ArgumentError(
            f"{weights.label} has the weights of a {weights.road}, and this is a {road.name}. Pass "
            "the checkpoint that they come from."
        )
    built = getattr(held, "built", None)
    if built and weights.built and built["processed"] != weights.built["processed"]:
        raise ArgumentError(
            f"The weights of {weights.label} are {'' if weights.built['processed'] else 'not '}"
            f"processed, and the {road.name}'s are {'' if built['processed'] else 'not '}processed."
            " Pass the checkpoint that they come from, or one that is processed alike."
        )
    parts = {name.partition(".")[0] for name in own_names(model)}
    given = {without_wrapper_parts(key).partition(".")[0] for key in weights.table}
    if built and not weights.built and given and given <= parts:
        raise ArgumentError(
            f"{weights.label} has TransformerLens' names. A {road.name} takes weights under "
            "Hugging Face's, as its state_dict() leaves some out (experts, fused matrices). Pass "
            "the model itself, a copy (save_lean), or a checkpoint in transformers' format."
        )


def _load_as_named(
    model: Any,
    held: nn.Module,
    weights: WeightSource,
    named: Mapping[str, Source],
    notes: list[str],
    strict: bool,
    reader: FileReader,
    bar: Progress,
) -> _Found:
    """Weights in TransformerLens' naming: copied as they are."""
    own = own_names(held)
    state = held.state_dict(keep_vars=True)
    parameters = dict(held.named_parameters(remove_duplicate=False))
    buffers = dict(held.named_buffers(remove_duplicate=False))
    found = _Found(notes=[*weights.notes, *notes])
    for name, why in weights.unusable.items():
        if name in own:
            found.problems.append(f"not usable: {name} ({why})")
        else:
            found.unexpected.append(f"{name} ({why})")
    writes = []
    for name, source in named.items():
        if name not in own:
            if road_of(model).role(name).kind != "table" and name not in buffers:
                found.unexpected.append(name)
            continue
        target = state[own[name]]
        is_parameter = own[name] in parameters
        problem = _problem(name, source, target, is_parameter)
        if problem is None:
            writes.append(Write(own[name], target, source))
        elif is_parameter:
            found.problems.append(problem)
        else:
            found.notes.append(f"The model's own table stays: {problem}.")
    found.missing = [
        bare
        for bare, name in own.items()
        if bare not in named
        and bare not in weights.unusable
        and not _may_be_missing(held, name, parameters)
    ]
    found.flags = None if found.missing else weights.flags
    found.notes += _hints(model, found)
    found.check(weights.label, strict, len(writes))
    _check_kinds(writes)
    given = {write.name: getattr(write.source, "tensor", None) for write in writes}
    require_cover(model, "load_weights_", given, held)
    read_through({write.name: write.source for write in writes}, reader)
    bar.start(sum(bytes_of(write.target) for write in writes))
    with InPlaceStep(model, "load_weights_") as step:
        InPlaceWriter(
            writes,
            wrote=lambda write: bar.advance(write.name, bytes_of(write.target)),
            writing=lambda write: step.writes(write.name),
        ).run()
        road_of(model).settle(held)
        reader.files.check_all()
        _remember(model, found.flags)
    return found


def _problem(name: str, source: Source, target: torch.Tensor, is_parameter: bool) -> str | None:
    """Why values cannot go into a tensor of the model, or None."""
    if not is_parameter:
        return table_problem(name, source.shape, source.dtype, target)
    one_number = target.dim() == 0 and source.shape.numel() == 1
    if source.shape != target.shape and not one_number:
        return f"misshapen: {name} is {tuple(source.shape)}, the model has {tuple(target.shape)}"
    if not source.dtype.is_floating_point:
        return f"not weights: {name} holds {source.dtype}"
    return None


def _may_be_missing(model: nn.Module, name: str, parameters: Mapping[str, Any]) -> bool:
    """Whether a tensor of the state dict follows from the configuration."""
    if name in parameters:
        return False
    owner = model.get_submodule(name.rpartition(".")[0])
    return type(owner).__module__.partition(".")[0] in ("transformer_lens", "transformers")


def _hints(model: Any, found: _Found) -> list[str]:
    """What is probably wrong when norm weights are too many or too few."""
    road = road_of(model)
    norms = [name for name in found.unexpected if road.role(name).is_folded]
    if norms and road.folded_names(model):
        return [
            "These weights are not processed, and the model is: its norms are folded into the "
            "layers behind them. model.load_and_process_state_dict(state_dict) folds them."
        ]
    if any(road.role(name).is_folded for name in found.missing):
        return [
            "These weights seem to come from a processed model, whose norms are folded away; this "
            "model has norm weights of its own."
        ]
    return []


def _check_kinds(writes: list[Write]) -> None:
    """Quantized parameters take quantized values of their own kind and geometry only."""
    for write in writes:
        if not isinstance(write.target, QuantizedTensor):
            continue
        given = write.source.tensor if isinstance(write.source, MemorySource) else None
        _check_kind(write.name, given, write.target)


def _check_kind(name: str, given: Any, target: QuantizedTensor) -> None:
    kind = target.content.stored.kind
    found = given.content.stored.kind if isinstance(given, QuantizedTensor) else "dense"
    if found != kind:
        problem = f"the weights for it are {found}"
    elif not views.is_same(given.geometry, target.geometry):
        problem = "the weights for it are rows in another order"
    else:
        return
    raise QuantizationError(
        f"{name} is quantized ({kind}), and {problem}; the model is as it was. Load weights of a "
        "model that is quantized alike, or load this model again from the new weights."
    )


def _load_converted(
    model: Any,
    weights: WeightSource,
    config: Any,
    processing: Mapping[str, bool] | None,
    strict: bool,
    reader: FileReader,
    bar: Progress,
) -> _Found:
    """Weights in Hugging Face's naming: converted and processed one parameter at a time."""
    flags = steps_of(model, processing)
    hf_config = find_config(config, weights, model)
    result = converted(model, weights, hf_config, flags, reader)
    notes = [*weights.notes, *result.recording.notes]
    found = _Found(result.missing, result.unexpected, result.problems, notes, flags)
    found.unexpected += [f"{name} ({why})" for name, why in weights.unusable.items()]
    recipes = result.recipes
    if not strict:
        recipes = {name: recipes[name] for name in recipes if name in result.determined}
        found.problems += _half_known(result)
    found.check(weights.label, strict, len(result.determined))
    held = result.recording.model
    own = own_names(held)
    recipes = {own[name]: promise for name, promise in recipes.items()}
    quantizer = _quantizer(held, recipes, result)
    require_cover(model, "load_weights_", recipes, held)
    read_through(weights.table, reader)
    with InPlaceStep(model, "load_weights_") as step:
        found.notes += write_recipes(held, recipes, step, quantizer, bar)
        road_of(model).settle(held)
        reader.files.check_all()
        _remember(model, flags)
    return found


def _half_known(result: Converted) -> list[str]:
    return [
        f"not complete: {name} comes from several weights, of which {listed(lacking, 3)} "
        f"{'is' if len(lacking) == 1 else 'are'} missing"
        for name, lacking in result.half_known.items()
    ]


def _quantizer(model: Any, recipes: Mapping[str, Promise], result: Converted) -> Quantizer | None:
    """What makes quantized parameters of the recipes; a rehearsal shows that it can."""
    targets = {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    if not targets:
        return None
    roles = road_of(model).roles_in(model)
    quantizer = Quantizer(None, roles, result.recording.shifts)
    for name, target in targets.items():
        if name in recipes:
            made = quantizer.keep(name, recipes[name], target.dtype, target.device)
            _check_kind(name, made, target)
    return quantizer


def _report(
    model: Any,
    weights: WeightSource,
    found: _Found,
    sampler: PeakSampler,
    seconds: float,
) -> LoadReport:
    return_freed_memory()
    processing = {} if found.flags is None else describe_steps(model, found.flags)
    kinds = {p.content.stored.kind for p in model.parameters() if isinstance(p, QuantizedTensor)}
    report = LoadReport.of(
        model,
        strategy="copy",
        reason="parameters keep their identity",
        source=weights.label,
        processing=processing,
        quantization=", ".join(sorted(kinds)) or None,
        notes=tuple(found.notes),
        missing_keys=tuple(found.missing),
        unexpected_keys=tuple(found.unexpected),
    )
    return report.measured(sampler, seconds)


def _remember(model: Any, flags: Mapping[str, bool] | None) -> None:
    """Note for later steps how the weights that the model has now were processed."""
    if flags is not None and hasattr(model, "_road"):  # of the lean classes
        model._processed = ({step for step, on in flags.items() if on}, parameter_versions(model))
