"""TransformerLens' processing run on promises, and what it would load collected."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.nn.modules.module import _IncompatibleKeys

from tl_fastload.errors import warn_numbers
from tl_fastload.ground import compat
from tl_fastload.ground.borrow import borrow, silenced
from tl_fastload.hooked import steps
from tl_fastload.hooked.names import role
from tl_fastload.hooked.norms import unit_norms
from tl_fastload.hooked.square import run_on_sides
from tl_fastload.placement.own_values import as_promise, own_values_apart
from tl_fastload.quantized import has_quantized
from tl_fastload.recipes.evaluate import evaluate
from tl_fastload.recipes.promise import Promise
from tl_fastload.roads.observer import Observer
from tl_fastload.roads.road import Recording
from tl_fastload.roads.shifts import kernel_shifts


@dataclass
class Recorder:
    """Stands behind a model while TransformerLens' loading code runs: takes what it would load.

    Attributes:
        recording: gets recipes, shifts and notes.
        observer: told of what stock would hold; None unless that is wanted.
        quiet: nothing but a plan is wanted: TransformerLens says nothing.
    """

    recording: Recording
    observer: Observer | None = None
    quiet: bool = False

    def collect(self, state_dict: Mapping[str, Any]) -> _IncompatibleKeys:
        """Take what TransformerLens would load."""
        for name, value in state_dict.items():
            is_promise = isinstance(value, Promise)
            self.recording.recipes[name] = value if is_promise else as_promise(value, name)
        if self.observer is not None:
            self.observer.load(state_dict)
        return _IncompatibleKeys([], [])

    def record(
        self,
        model: Any,
        state_dict: dict[str, Any],
        flags: Mapping[str, bool],
        stock: Callable[..., None],
    ) -> None:
        """Run TransformerLens' `load_and_process_state_dict` on promises; the recording's recipes
        are then what it would load.

        Args:
            model: the model, or what stands in for it: TransformerLens' `load_state_dict` of it
                calls `collect`.
            state_dict: TransformerLens names -> tensors or promises; not changed.
            flags: the processing steps; those that the model does not allow are left out.
            stock: TransformerLens' bound `load_and_process_state_dict`.
        """
        found, pretrained = self.recording, self.recording.pretrained
        own: dict[str, Any] = {}
        if self.observer is not None and pretrained is not None:
            own = self.observer.hand_over(pretrained.root, state_dict)
            state_dict.clear()  # which `from_pretrained` holds: stock puts its copies in this one
            state_dict = own
        promises = {
            name: value if isinstance(value, Promise) else as_promise(value, name)
            for name, value in own_values_apart(model, state_dict).items()
            if isinstance(value, torch.Tensor)
        }
        own = state_dict = {}  # the promises are held once, as the tensors are in stock
        # TransformerLens guards only some of its roads; unguarded steps change the model's output.
        allowed = {
            step: on and steps.reason_to_skip(step, model.cfg) is None for step, on in flags.items()
        }
        if pretrained is None and has_quantized(model):
            # Their values now: the parameters that they are made of are written to one by one.
            found.shifts = {
                name: as_promise(evaluate(shift.node, shift.device).tensor.clone(), name)
                for name, shift in kernel_shifts(promises, role, model.cfg, allowed).items()
            }
        elif pretrained is not None and pretrained.spec is not None:
            found.shifts = kernel_shifts(promises, role, model.cfg, allowed)
        has_norms = pretrained is not None and not self.quiet
        if compat.REPLACES_NORMS and not has_norms and allowed["fold_ln"]:
            promises |= self._unit_norms(model, promises)
        run = _looking_in_layers(silenced(stock) if self.quiet else stock)
        found.notes += run_on_sides(model, promises, allowed, run, found.recipes)

    def _unit_norms(self, model: Any, promises: dict[str, Promise]) -> dict[str, Promise]:
        """Stand-ins for norms that were folded before, which TransformerLens 2 wants to fold."""
        has_norms = any(role(name).is_folded for name, _ in model.named_parameters())
        if self.recording.pretrained is None and has_norms:
            self.recording.notes.append(
                warn_numbers(
                    f"TransformerLens {compat.TRANSFORMER_LENS} folds the norms of the state dict "
                    "and leaves those of the model as they are, so that both are applied. Use "
                    "process_weights_, or a model whose cfg.normalization_type ends in Pre."
                )
            )
        return unit_norms(model, promises)


_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")


class _Layers:
    """TransformerLens' search for a name that a state dict does not have, kept to the names of its
    layer: it passes all names for each, which is most of the time for hundreds of layers.

    Args:
        search: TransformerLens' own.
    """

    def __init__(self, search: Callable[..., str]) -> None:
        self._search = search
        self._names: list[str] = []  # not the state dict: what it holds would live on
        self._layers: dict[str, dict[str, Any]] = {}

    def find(self, state_dict: dict[str, Any], key: str, *args: Any, **kwargs: Any) -> str:
        """As the search, which takes names that hold the layer's number only."""
        layer = role(key).layer
        if key in state_dict or layer is None:
            return self._search(state_dict, key, *args, **kwargs)
        names = list(state_dict)
        if names != self._names:
            self._names, self._layers = names, {}
            for name in names:
                for number in _NUMBERS.findall(name):
                    self._layers.setdefault(number, {})[name] = None
        return self._search(self._layers.get(str(layer), {}), key, *args, **kwargs)


def _looking_in_layers(stock: Callable[..., None]) -> Callable[..., None]:
    """TransformerLens' processing with that search; itself where a version has none."""
    if not isinstance(stock, MethodType) or not isinstance(stock.__func__, FunctionType):
        return stock
    steps_of_stock = stock.__func__.__globals__.get("ProcessWeights")
    search = getattr(steps_of_stock, "_resolve_state_dict_key", None)
    if not isinstance(steps_of_stock, type) or not isinstance(search, FunctionType):
        return stock
    own = type(steps_of_stock.__name__, (steps_of_stock,), {})
    for name, function in vars(steps_of_stock).items():
        if isinstance(function, staticmethod) and isinstance(function.__func__, FunctionType):
            setattr(own, name, staticmethod(borrow(function.__func__, ProcessWeights=own)))
    own._resolve_state_dict_key = staticmethod(_Layers(search).find)  # type: ignore[attr-defined]
    return MethodType(borrow(stock.__func__, ProcessWeights=own), stock.__self__)
