"""Weights in Hugging Face's naming for a live model: TransformerLens' converter and processing run
on their promises.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformer_lens import HookedTransformer

from tl_fastload.hooked.answers import Answers
from tl_fastload.hooked.names import is_unread, role
from tl_fastload.hooked.processing import Recorder
from tl_fastload.hooked.stock import convert
from tl_fastload.huggingface.pretrained import Pretrained
from tl_fastload.placement.own_values import as_promise
from tl_fastload.recipes.promise import Promise
from tl_fastload.roads.road import Recording


class _Recorder:
    """In front of a HookedTransformer class: what TransformerLens would load is collected."""

    _recorder: Recorder

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return self._recorder.collect(state_dict)

    def fill_missing_keys(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Biases that the architecture does not have are zero, as in a fresh model."""
        return {**_zeros(self, state_dict), **state_dict}

    def setup(self) -> None:
        """The hooks of the model are in place."""


def record_weights(model: Any, pretrained: Pretrained, flags: Mapping[str, bool]) -> Recording:
    """As `tl_fastload.roads.road.Road.record_weights`."""
    recording = Recording(model, dict(flags), pretrained)
    recorder = Recorder(recording)
    named = convert(Answers(pretrained), _with_architecture(model.cfg, pretrained))
    shadow: Any = object.__new__(type("Recording", (_Recorder, type(model)), {}))
    shadow.__dict__.update({**model.__dict__, "_recorder": recorder})
    stock = HookedTransformer.load_and_process_state_dict.__get__(shadow)
    recorder.record(shadow, named, flags, stock)
    own = dict(model.named_parameters())  # the model's own tables stay
    recording.recipes = {n: made for n, made in recording.recipes.items() if n in own}
    return recording


def _with_architecture(cfg: Any, pretrained: Pretrained) -> Any:
    if cfg.original_architecture is not None:
        return cfg
    known = copy.copy(cfg)
    known.original_architecture = pretrained.architecture
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
