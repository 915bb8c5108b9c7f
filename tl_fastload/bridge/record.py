"""A load as far as it goes without weights: TransformerLens' boot and processing, run to their end
on promises.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tl_fastload.bridge.boot import run_boot
from tl_fastload.bridge.leftovers import require_none_left
from tl_fastload.bridge.placing import BridgeShelf
from tl_fastload.bridge.quantizing import Inputs, forget_quantizer
from tl_fastload.bridge.slots import slots_of
from tl_fastload.bridge.steps import run_stock
from tl_fastload.errors import ArgumentError, UnsupportedArchitectureError
from tl_fastload.ground.hf_configs import declared_architectures, text_config
from tl_fastload.ground.words import listed
from tl_fastload.huggingface.pretrained import Pretrained
from tl_fastload.huggingface.runnable import make_runnable, own_configuration, tie_equal
from tl_fastload.huggingface.tokenizer import (
    is_failure,
    load_tokenizer,
    lost_tokenizer,
    named,
    read_tokenizer,
)
from tl_fastload.request.steps import STEPS
from tl_fastload.roads.observer import Observer
from tl_fastload.roads.road import Recording, Request

IS_RECORDING = "_is_recording"
COMPATIBILITY = "compatibility"
"""An argument of requests: False leaves a bridge as it is booted."""

PROCESSED = "processed"
"""Likewise: whether weights are processed; by default in compatibility mode, and not without."""

BOOT_ARGUMENTS = ("hf_config_overrides", "model_class", "checkpoint_index", "n_ctx", "tokenizer")
"""Arguments of `boot_transformers` that it gets as they are."""

_DeviceOf = Callable[[str], torch.device]
_LAYER = re.compile(r"\.(?:h|layers?|blocks?)\.(\d+)\.")


def record(
    request: Request,
    pretrained: Pretrained,
    *,
    on_meta: bool = False,
    observer: Observer | None = None,
) -> Recording:
    """As `tl_fastload.roads.road.Road.record`."""
    hf_config = copy.deepcopy(pretrained.config)
    bridge, inputs, notes = boot_and_process(request, pretrained, is_quiet=on_meta)
    requested = {step: bool(request.arguments[step]) for step in STEPS}
    shelf = BridgeShelf(
        bridge,
        is_raw=not request.arguments.get(COMPATIBILITY, True),
        on_meta=request.options.assigns,
        is_shared=request.options.mesh is not None,
    )
    shelf.finish = lambda device_of: _finished(bridge, shelf, hf_config, device_of)
    shifts = inputs.shifts(shelf.recipes, requested)
    return Recording(shelf, requested, pretrained, shelf.recipes, shifts, notes)


def boot_and_process(
    request: Request, pretrained: Pretrained, *, is_quiet: bool
) -> tuple[Any, Inputs, list[str]]:
    """TransformerLens' bridge, on promises; what its matrices read; and notes for the report.

    Args:
        request: the call; its arguments say what is processed.
        pretrained: the model.
        is_quiet: look for no tokenizer.
    """
    arguments = request.arguments
    answers = _Answers(request, pretrained, is_quiet)
    boot = {name: arguments[name] for name in BOOT_ARGUMENTS if arguments.get(name) is not None}
    value = arguments["checkpoint_value"]
    value = arguments["checkpoint_label"] if value is None else value
    bridge = run_boot(
        answers,
        request.cls,
        str(arguments["model_name"]),
        dtype=request.dtype,
        device=arguments["device"] if arguments["move_to_device"] else "cpu",
        trust_remote_code=pretrained.keywords.trust_remote_code,
        checkpoint_value=value,
        **boot,
    )
    _set_up(bridge, arguments)
    inputs = Inputs(bridge)
    in_mode = arguments.get(COMPATIBILITY, True)
    is_processed = arguments.get(PROCESSED, in_mode)
    if in_mode or is_processed:
        bridge.__dict__[IS_RECORDING] = True
        try:
            requested = {step: bool(arguments[step]) for step in STEPS}
            if in_mode:
                act = partial(bridge.enable_compatibility_mode, no_processing=not is_processed)
            else:
                act = bridge.process_weights
            with torch.no_grad():
                run_stock(lambda: act(**requested))
        except UnsupportedArchitectureError as error:
            if pretrained.missing() or not pretrained.ledger.fits:
                raise (error.__cause__ or error) from None  # the load says what is wrong with them
            raise
        finally:
            del bridge.__dict__[IS_RECORDING]
    pretrained.is_recording = False
    return bridge, inputs, answers.notes


def _set_up(bridge: Any, arguments: dict[str, Any]) -> None:
    if arguments["default_prepend_bos"] is not None:
        bridge.cfg.default_prepend_bos = arguments["default_prepend_bos"]
    if arguments["default_padding_side"] is not None:
        if bridge.tokenizer is None:
            raise ArgumentError("default_padding_side= is for a tokenizer, and the model has none.")
        bridge.tokenizer.padding_side = arguments["default_padding_side"]


def _finished(bridge: Any, shelf: BridgeShelf, hf_config: Any, device_of: _DeviceOf) -> Any:
    shelf.clear()
    bridge._hf_config = hf_config
    bridge._layout, bridge._quantization = shelf._layout, shelf._quantization
    return completed(bridge, device_of)


def completed(bridge: Any, device_of: _DeviceOf) -> Any:
    """A bridge whose weights are in their slots: with its tables beside them.

    Args:
        bridge: the bridge.
        device_of: where what has some name lies.
    """
    require_none_left(bridge)
    _move_tables(bridge, device_of)
    return bridge


def _move_tables(bridge: Any, device_of: _DeviceOf) -> None:
    """Put what was computed, not placed, on the device of its part."""
    for slot in slots_of(bridge):
        device = device_of(slot.name)
        if slot.tensor.device.type == "cpu" != device.type:
            moved = slot.tensor.detach().to(device)
            is_parameter = isinstance(slot.tensor, nn.Parameter)
            trainable = slot.tensor.requires_grad
            slot.tensor = nn.Parameter(moved, trainable) if is_parameter else moved


class _Answers:
    """A pretrained model, as TransformerLens' boot asks about it.

    Attributes:
        notes: for the report.
    """

    def __init__(self, request: Request, pretrained: Pretrained, on_meta: bool) -> None:
        self._request, self._pretrained, self._on_meta = request, pretrained, on_meta
        self._n_layers: int | None = request.arguments["first_n_layers"]
        self._revision: str | None = None
        self._is_lost = False
        self.notes: list[str] = []

    def config(self, revision: str | None) -> Any:
        """transformers' configuration, with as many layers as are wanted."""
        self._revision = revision
        config = copy.deepcopy(self._pretrained.config)
        config.__dict__.pop("quantization_config", None)  # its layers are plain ones
        part = text_config(config)
        if self._n_layers is None:
            return config
        if any(getattr(one, "is_encoder_decoder", False) for one in (config, part)):
            raise ArgumentError(
                f"first_n_layers= is for one stack of layers, and {self._pretrained.label} has an "
                "encoder and a decoder. Leave it out."
            )
        if not 0 < self._n_layers <= part.num_hidden_layers:
            raise ArgumentError(
                f"first_n_layers={self._n_layers}, but {self._pretrained.label} has "
                f"{part.num_hidden_layers} layers."
            )
        for name, value in list(vars(part).items()):
            if isinstance(value, list) and len(value) == part.num_hidden_layers:
                setattr(part, name, value[: self._n_layers])
        part.num_hidden_layers = self._n_layers
        return config

    def tokenizer(self, name: str, **kwargs: Any) -> Any:
        """The tokenizer that lies with the model, or that its adapter names. The weights do not
        need it: None for a model without one.
        """
        if self._on_meta or self._is_lost:
            return None
        keywords = {"trust_remote_code": False, **kwargs}
        try:
            if name != str(self._request.arguments["model_name"]):
                return load_tokenizer(name, keywords)
            with self._pretrained.tokenizer_folder() as folder:
                if folder is None:
                    return load_tokenizer(name, keywords)
                for unused in ("token", "revision"):
                    keywords.pop(unused, None)
                return named(read_tokenizer(folder, **keywords), name)
        except BaseException as error:  # tokenizers raise anything at all
            if not is_failure(error):
                raise
            if isinstance(error, ValueError) and "add_bos_token" in keywords:
                raise  # boot tries again without
            self._is_lost = True
            self.notes.append(lost_tokenizer(name, error))
            return None

    def model(self, model_class: Any, hf_config: Any, dtype: torch.dtype, attention: str) -> Any:
        """The transformers model, on promises."""
        found = self._pretrained
        if found.hf_model is None:
            found.model_class, found.config = model_class, hf_config
        model = found.tree(dtype, self._revision)
        if model_class.__name__ not in declared_architectures(hf_config.architectures):
            self._leave_out(model_class)
        if self._n_layers is not None:
            found.ledger.unexpected = [n for n in found.ledger.unexpected if not self._is_beyond(n)]
        if found.hf_model is not None:
            own_configuration(model)
            forget_quantizer(model)
            # TransformerLens takes a model in memory as it is, attentions off or on.
            hf_config.output_attentions = found.config.output_attentions
        elif found.promises or not self._on_meta:
            tie_equal(model, found.ledger.tied)
        folder = None if found.location is None else found.location.folder
        make_runnable(model, hf_config, dtype, folder, attention)
        return model

    def _leave_out(self, model_class: Any) -> None:
        """Let the weights of parts go that the class which TransformerLens takes does not have."""
        ledger = self._pretrained.ledger
        if ledger.unexpected:
            self.notes.append(
                f"{model_class.__name__}, which TransformerLens takes for this model, has no place "
                f"for {listed(ledger.unexpected)}."
            )
            ledger.unexpected = []

    def _is_beyond(self, name: str) -> bool:
        layer = _LAYER.search("." + name)
        return layer is not None and int(layer.group(1)) >= (self._n_layers or 0)
