"""TransformerLens' processing of a live model, recorded: the model itself never knows, as an
interrupt could leave it so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tl_fastload.ground import compat
from tl_fastload.hooked.processing import Recorder
from tl_fastload.hooked.steps import reason_to_skip
from tl_fastload.roads.road import Recording


def record_state_dict(
    model: Any, state_dict: dict[str, Any], flags: Mapping[str, bool], stock: Callable[..., None]
) -> Recording:
    """Run TransformerLens' `load_and_process_state_dict` on promises.

    Args:
        model: not written to.
        state_dict: TransformerLens names -> tensors; not changed.
        flags: the processing steps.
        stock: the model's own bound `load_and_process_state_dict`.
    """
    recording = Recording(model, dict(flags))
    recorder = Recorder(recording)
    shadow = _shadow(model, _recorder=recorder)
    recorder.record(shadow, state_dict, flags, _bound(stock, shadow))
    # What TransformerLens has set on the stand-in, such as the table of hooks.
    for name, value in shadow.__dict__.items():
        if name != "_recorder" and model.__dict__.get(name) is not value:
            model.__dict__[name] = value
    return recording


def process_with(
    model: Any,
    flags: Mapping[str, bool],
    stock: Callable[..., None],
    load: Callable[..., None],
) -> None:
    """Have TransformerLens hand the state dict that it would process to `load`.

    Args:
        model: the model.
        flags: the processing steps.
        stock: the model's own bound `process_weights_`, which version 2 replaces the norms in.
        load: takes a state dict, and steps by name where they are others than `flags`.
    """
    folds = flags["fold_ln"] and reason_to_skip("fold_ln", model.cfg) is None
    if not (compat.REPLACES_NORMS and folds):
        load(model.state_dict())
        return
    asked = {name: on for name, on in flags.items() if name != "fold_value_biases"}
    _bound(stock, _shadow(model, load_and_process_state_dict=load))(**asked)


def _shadow(model: Any, **attributes: Any) -> Any:
    """A stand-in of the same class and with the same modules, which knows some names otherwise."""
    shadow = object.__new__(type(model))
    shadow.__dict__.update({**model.__dict__, **attributes})
    return shadow


def _bound(method: Any, model: Any) -> Callable[..., None]:
    bound: Callable[..., None] = method.__func__.__get__(model)
    return bound
