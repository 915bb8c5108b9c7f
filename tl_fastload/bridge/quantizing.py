"""What quantized weights of a bridge need beside their bytes: which way round they lie, and what
processing takes out of their inputs.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from tl_fastload.bridge import names
from tl_fastload.bridge.slots import slots_of
from tl_fastload.bridge.steps import why_skipped
from tl_fastload.errors import ArgumentError
from tl_fastload.ground.role import Role
from tl_fastload.huggingface.keys import is_conv1d
from tl_fastload.huggingface.tree import plain_layer
from tl_fastload.quantized import QuantizedTensor, formats, has_quantized
from tl_fastload.quantized.content import Content
from tl_fastload.quantized.recipes import reads_quantized
from tl_fastload.recipes.promise import Promise
from tl_fastload.roads.shifts import kernel_shifts

_MARKS = (
    *("hf_quantizer", "is_quantized", "quantization_method"),
    *("is_loaded_in_4bit", "is_loaded_in_8bit"),
)
"""Attributes by which transformers' models say that they are quantized."""


def role_in(name: str, module: nn.Module, others: Container[str]) -> Role:
    """What a parameter is, by its name and by the module that holds it.

    Args:
        name: of the parameter.
        module: the module.
        others: names of all parameters of the bridge.
    """
    found = names.role(name)
    if found.what == "router" and name.replace(".gate.", ".in.") in others:
        # One half of what the model has in one matrix; routers have no other half.
        found = names.role(name.replace(".gate.", ".gate_proj."))
    if found.kind == "matrix" and is_conv1d(type(module)):
        return replace(found, sides=found.sides[::-1])
    if found.part == "other" and not isinstance(module, nn.Linear):
        return Role()
    return found


def forget_quantizer(model: Any) -> None:
    """Let a transformers model be one of plain layers, whose weights are bytes."""
    model.config.__dict__.pop("quantization_config", None)
    for name in _MARKS:
        model.__dict__.pop(name, None)


def make_plain(bridge: Any) -> None:
    """Make plain layers of a bridge's quantized ones, in place, on the same bytes."""
    for name, module in list(nn.Module.named_modules(bridge.original_model)):
        layer = formats.of_layer(module, f"{name}.weight")
        if layer is None:
            continue
        weight: Any = QuantizedTensor(Content(*layer), None, bridge.cfg.dtype)
        weight = weight.t() if is_conv1d(getattr(module, "source_cls", None)) else weight
        plain = plain_layer(module, weight.shape)
        plain._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        plain._parameters["bias"] = module._parameters.get("bias")
        module.__dict__ = plain.__dict__
        module.__class__ = type(plain)
    forget_quantizer(bridge.original_model)


def require_bytes_can_follow(bridge: Any, flags: Mapping[str, bool]) -> None:
    """Raise ArgumentError for a step that quantized weights cannot take."""
    if flags["refactor_factored_attn_matrices"] and has_quantized(bridge.original_model):
        raise ArgumentError(
            "refactor_factored_attn_matrices=True mixes the values of several matrices, which "
            "quantized bytes cannot follow. Load the unquantized checkpoint with quantize=, which "
            "refactors first."
        )


class Inputs:
    """The parameters of a bridge before processing, if any of them is quantized: what kernels that
    round activations were quantized for.

    Args:
        bridge: the bridge, on promises.
    """

    def __init__(self, bridge: Any) -> None:
        slots = {slot.name: slot for slot in slots_of(bridge) if slot.is_parameter}
        found = {name: s.tensor for name, s in slots.items() if isinstance(s.tensor, Promise)}
        self._cfg = bridge.cfg
        self._before: dict[str, Promise] = {}
        self._roles: dict[str, Role] = {}
        if any(reads_quantized(promise.node) for promise in found.values()):
            # A promise in a bridge may be written to; recipes stay what they are.
            self._before = {n: Promise(p.node, p.meta, p.device) for n, p in found.items()}
            self._roles = {name: role_in(name, slots[name].module, slots) for name in found}

    def shifts(
        self, recipes: Mapping[str, Promise], flags: Mapping[str, bool]
    ) -> dict[str, Promise]:
        """Name of a matrix -> what processing has taken out of its input.

        Args:
            recipes: of all parameters after processing.
            flags: the steps that were asked for.
        """
        ran = {step: on and why_skipped(step, self._cfg) is None for step, on in flags.items()}
        made = kernel_shifts(self._before, self._roles.__getitem__, self._cfg, ran)
        return {
            name: shift
            for name, shift in made.items()
            # TransformerLens keeps some matrices that it has split, as they were.
            if not self._roles[name].reads or self._is_changed(name, recipes)
        }

    def _is_changed(self, name: str, recipes: Mapping[str, Promise]) -> bool:
        return name in recipes and recipes[name].node is not self._before[name].node
