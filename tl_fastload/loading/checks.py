"""Checks of what fits together: arguments and checkpoint, state dicts, recipes. All that is wrong
is told at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from tl_fastload.errors import (
    ArgumentError,
    CheckpointError,
    LeanLoadError,
    MissingWeightsError,
    NotEnoughMemory,
    QuantizationError,
    is_out_of_memory,
)
from tl_fastload.ground import compat
from tl_fastload.ground.boundary import is_callers
from tl_fastload.ground.own_defaults import looking_only
from tl_fastload.ground.words import listed
from tl_fastload.huggingface.keys import layer_of
from tl_fastload.huggingface.pretrained import Pretrained
from tl_fastload.huggingface.tree import MissingSource
from tl_fastload.quantized import QuantizedTensor, formats
from tl_fastload.quantized.recipes import follow
from tl_fastload.recipes.evaluate import sources
from tl_fastload.recipes.promise import Promise
from tl_fastload.request.contradictions import CHECKPOINT_ARGUMENTS, device_asked_for
from tl_fastload.request.options import Options
from tl_fastload.roads.known import road_of
from tl_fastload.roads.road import Recording

# What TransformerLens raises for fields that make no sense.
_OF_A_CONFIGURATION = (
    *(ArithmeticError, LookupError, ValueError, AssertionError, TypeError, AttributeError),
    RuntimeError,
)
# Parts of multimodal checkpoints that the text model does not have.
_NOT_TEXT = re.compile(r"(vision_tower|vision_model|multi_modal_projector|audio_tower)")


def check_quantization(pretrained: Pretrained, options: Options, arguments: dict[str, Any]) -> None:
    """Raise for quantization that contradicts the checkpoint, or that cannot run here."""
    spec = pretrained.spec or options.quantize
    if spec is None:
        return
    if pretrained.spec is not None and options.quantize is not None:
        raise ArgumentError(
            f"{pretrained.label} is quantized already ({pretrained.spec.kind}): leave "
            "quantize= out, or take the unquantized checkpoint."
        )
    if pretrained.spec is not None and arguments["refactor_factored_attn_matrices"]:
        raise ArgumentError(
            "refactor_factored_attn_matrices=True mixes the values of several matrices, which "
            f"quantized bytes cannot follow. {pretrained.label} is quantized: load the unquantized "
            "checkpoint with quantize=, which refactors first."
        )
    if options.mesh is not None:
        raise ArgumentError(
            f"{pretrained.label} is quantized ({spec.kind}), and mesh= shares dense weights only: "
            "quantized bytes cannot be cut yet. Load it without mesh=, in each process."
        )
    if not compat.can_assign():
        raise ArgumentError(
            f"Quantized weights need torch {compat.ASSIGN_NEEDS_TORCH} or newer, this is "
            f"{compat.TORCH}: upgrade torch, or load the unquantized checkpoint without quantize=."
        )
    if not options.assigns:
        raise ArgumentError(
            "Quantized weights are put into the model as they are, which a copying load cannot do: "
            'use strategy="auto".'
        )
    formats.of_kind(spec.kind).require_device(device_asked_for(arguments))


def check_adapters(pretrained: Pretrained, options: Options) -> None:
    """Raise for adapters that contradict what they are to be merged into."""
    if options.requantize and (pretrained.spec is None or not pretrained.adapters):
        raise ArgumentError(
            "requantize=True is for merging adapter= into weights that are quantized already: "
            f"{pretrained.label} "
            + ("has no adapter" if pretrained.spec is not None else "is not quantized")
            + ". Leave it out."
        )
    if not pretrained.adapters:
        return
    if pretrained.config is None:
        raise ArgumentError(
            f"adapter= needs a model in Hugging Face's format; {pretrained.label} is in "
            "TransformerLens' own."
        )
    if pretrained.spec is not None and not options.requantize:
        kind = pretrained.spec.kind
        remedy = (
            "Pass requantize=True to dequantize, merge and quantize again (which rounds twice)"
            if formats.of_kind(kind).offered
            else f"{kind} weights cannot be quantized again: pass dequantize=True to merge into "
            "ordinary weights, requantize=True if it changes only weights that are not quantized"
        )
        raise ArgumentError(
            f"{pretrained.label} is quantized already ({kind}), and an adapter changes the values "
            f"behind its bytes. {remedy}, or take the unquantized checkpoint with adapter= and "
            "quantize=."
        )


def check_state_dict(model: Any, state_dict: Mapping[str, Any], flags: Mapping[str, bool]) -> None:
    """Raise MissingWeightsError if tensors of a state dict have other shapes than the model's, and
    ArgumentError if they cannot become its quantized weights.
    """
    own = model.state_dict(keep_vars=True)
    quantized = {name for name, value in own.items() if isinstance(value, QuantizedTensor)}
    if quantized and flags["refactor_factored_attn_matrices"]:
        raise ArgumentError(
            "refactor_factored_attn_matrices=True mixes the values of several matrices, which "
            "quantized bytes cannot follow. Load the unquantized checkpoint with quantize=, which "
            "refactors first."
        )
    dense = [
        name
        for name in sorted(quantized & state_dict.keys())
        if not isinstance(state_dict[name], QuantizedTensor)
    ]
    if dense:
        raise ArgumentError(
            f"The model's {listed(dense)} are quantized, the state dict's are not; the model is "
            "unchanged. Load these weights into an unquantized model, or a checkpoint of them with "
            "quantize=."
        )
    wrong = [
        f"{name}: {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in state_dict.items()
        if isinstance(value, torch.Tensor) and name in own and not _fits(value, own[name])
    ]
    if wrong:
        raise MissingWeightsError(
            "The state dict has tensors of the wrong shape; the model is unchanged:\n  "
            + "\n  ".join(wrong)
        )


def check_in_place(model: Any, recipes: Mapping[str, Promise]) -> None:
    """Raise ArgumentError if a quantized parameter of a live model cannot follow its recipe."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedTensor) and name in recipes:
            try:
                follow(recipes[name].node, parameter.device)
            except QuantizationError as error:
                raise ArgumentError(
                    f"{name} cannot be processed in place: {error}. The model is unchanged. Load "
                    "it again with the processing steps, or with a state dict that is not "
                    "processed yet."
                ) from error


def check_recipes(recording: Recording) -> None:
    """Raise MissingWeightsError for everything of the checkpoint that does not fit the model."""
    if recording.pretrained is not None:
        _raise_for(recording.pretrained, recipe_problems(recording, recording.pretrained))


@looking_only
def recipe_problems(recording: Recording, pretrained: Pretrained) -> list[str]:
    """Everything of the checkpoint that does not fit the model, a line each."""
    recipes = recording.recipes
    read = [view.source for promise in recipes.values() for view in sources(promise.node)]
    missing = sorted({source.name for source in read if isinstance(source, MissingSource)})
    problems = [f"missing: {name}" for name in missing] + _ledger_problems(pretrained)
    own = dict(recording.model.named_parameters())
    for name, promise in recipes.items():
        if name in own and not _fits(promise, own[name]):
            found, wanted = tuple(promise.shape), tuple(own[name].shape)
            problems.append(f"misshapen: {name} comes out as {found} instead of {wanted}")
    unread = _unread(recording.model, pretrained, {id(source) for source in read})
    kind = road_of(recording.model).name
    return problems + [f"no place in {kind} for: {name}" for name in unread]


def explain(pretrained: Pretrained, error: Exception, arguments: dict[str, Any]) -> None:
    """Raise an error of this family for one that TransformerLens' own loading code raised.

    Args:
        pretrained: what was being loaded.
        error: what was raised.
        arguments: of the load.
    """
    if isinstance(error, LeanLoadError):
        return
    if is_out_of_memory(error):
        raise NotEnoughMemory(
            f"Memory ran out while the weights of {pretrained.label} were looked at ({error}). "
            "Nothing was loaded. Free some, or see tl_fastload.plan for what would fit."
        ) from error
    if isinstance(error, RecursionError) or is_callers(error):
        return
    if pretrained.root is None and isinstance(error, _OF_A_CONFIGURATION):
        given = [name for name in CHECKPOINT_ARGUMENTS if arguments.get(name) is not None]
        if given:
            raise ArgumentError(
                f"{given[0]}={arguments[given[0]]!r} does not name a training checkpoint of "
                f"{pretrained.label}: {error}"
            ) from error
        raise CheckpointError(
            f"The configuration of {pretrained.label} describes no model that can be built: "
            f"{type(error).__name__}: {error}. Correct its config.json."
        ) from error
    if not pretrained.is_recording:
        return
    problems = [f"missing: {name}" for name in pretrained.missing()] + _ledger_problems(pretrained)
    if not problems:
        problems = [f"TransformerLens' converter stumbled: {type(error).__name__}: {error}"]
    _raise_for(pretrained, problems)


def _raise_for(pretrained: Pretrained, problems: list[str]) -> None:
    """Raise one MissingWeightsError with all problems, if there are any."""
    if problems:
        raise MissingWeightsError(
            f"{pretrained.label} does not fit the model that its configuration describes:\n  "
            + "\n  ".join(problems)
            + "\nNothing was loaded. Check that the checkpoint is complete and belongs to this "
            "config.json; to load it as transformers does, pass "
            "hf_model=AutoModelForCausalLM.from_pretrained(...)."
        )


def _ledger_problems(pretrained: Pretrained) -> list[str]:
    problems = [
        f"unexpected: {name}"
        for name in sorted(pretrained.ledger.unexpected)
        if not _NOT_TEXT.search(name)
    ]
    for name, (found, wanted) in sorted(pretrained.ledger.misshapen.items()):
        problems.append(f"misshapen: {name} is {found}, the configuration asks for {wanted}")
    problems += [
        f"not weights: {name} holds {t}" for name, t in sorted(pretrained.ledger.integers.items())
    ]
    problems += [
        f"not complete: {name}: {e}" for name, e in sorted(pretrained.ledger.incomplete.items())
    ]
    return problems


def _fits(tensor: torch.Tensor, parameter: torch.Tensor) -> bool:
    return tensor.shape == parameter.shape or (tensor.numel() == 1 and parameter.dim() == 0)


def _unread(model: Any, pretrained: Pretrained, read: set[int]) -> list[str]:
    """Weights of the checkpoint that no parameter of the model depends on."""
    if pretrained.root is None or not hasattr(pretrained.root, "named_parameters"):
        return []
    unread = []
    for name, promise in pretrained.root.named_parameters():
        layer = layer_of(name)
        beyond = layer is not None and layer >= model.cfg.n_layers
        if (
            beyond
            or road_of(model).is_unused(name, model.cfg)
            or _NOT_TEXT.search(name)
            or not isinstance(promise, Promise)
        ):
            continue
        found = [view.source for view in sources(promise.node)]
        if not any(id(s) in read or isinstance(s, MissingSource) for s in found):
            unread.append(name)
    return unread
