"""A transformers model as its own `from_pretrained` returns it, with promises for its weights:
tables computed, generation settings read, in evaluation mode.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from tl_fastload.errors import UnsupportedArchitectureError
from tl_fastload.ground import compat
from tl_fastload.ground.own_defaults import Defaults
from tl_fastload.ground.words import listed
from tl_fastload.huggingface.empty import SkipRandomInit
from tl_fastload.huggingface.tree import MissingSource
from tl_fastload.recipes.live import LivePromise
from tl_fastload.recipes.nodes import PIECE_ELEMENTS, SourceView
from tl_fastload.recipes.promise import Promise


def make_runnable(
    model: Any,
    hf_config: Any,
    dtype: torch.dtype,
    folder: Path | None,
    attention: str | None = None,
) -> None:
    """Make a tree of promises a model that code can run through, as `from_pretrained` returns it.

    Args:
        model: from `tl_fastload.huggingface.tree`; its tensors become `LivePromise`s, or tables
            that are computed here.
        hf_config: the configuration that was loaded.
        dtype: of its parameters.
        folder: where `generation_config.json` lies, if there is one; None takes the settings from
            the configuration.
        attention: which of transformers' implementations of attention it uses; None takes "eager".

    Raises:
        UnsupportedArchitectureError: a table cannot be computed.
    """
    _make_alive(model, dtype)
    for module in model.modules():
        if _asks_for_default_dtype(module):
            for leaf, buffer in module._buffers.items():
                if buffer is not None and _is_empty(buffer) and buffer.is_floating_point():
                    module._buffers[leaf] = buffer.to(dtype)
    _compute_tables(model)
    _set_configuration(model, hf_config, dtype, attention)
    if not hasattr(model, "generation_config"):
        _read_generation_config(model, hf_config, folder)
    model.eval()


def tie_equal(model: nn.Module, groups: list[list[str]]) -> None:
    """Make one parameter of weights that a model ties and a checkpoint has several times, if they
    are equal, as transformers does.

    Args:
        model: a tree of promises.
        groups: names of what is tied.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for names in groups:
        first: Any = tensors[names[0]]
        for name in names[1:]:
            parent, _, leaf = name.rpartition(".")
            if tensors[name] is not first and _are_equal(first, tensors[name]):
                model.get_submodule(parent)._parameters[leaf] = first


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    rows = max(1, PIECE_ELEMENTS * one.shape[0] // max(one.numel(), 1))
    pieces = zip(torch.split(one, rows), torch.split(other, rows), strict=True)
    return all(bool((a == b).all()) for a, b in pieces)


def own_configuration(shadow: nn.Module) -> None:
    """Give the shadow of a caller's model configurations of its own, each in all its places."""
    memo: dict[int, Any] = {}
    for module in shadow.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, (PretrainedConfig, GenerationConfig)):
                module.__dict__[name] = copy.deepcopy(value, memo)


def concrete_class(auto_class: Any, hf_config: Any) -> Any:
    """The class of which one of transformers' Auto classes makes a model, or that class itself.

    Raises:
        UnsupportedArchitectureError: transformers has none for this configuration.
    """
    mapping = getattr(auto_class, "_model_mapping", None)
    if mapping is None:
        return auto_class
    from transformers.models.auto.auto_factory import _get_model_class

    if type(hf_config) not in mapping:
        raise UnsupportedArchitectureError(
            f"transformers {compat.TRANSFORMERS} has no {auto_class.__name__} for a "
            f"{type(hf_config).__name__}. Load it with transformers (a checkpoint's own code needs "
            "trust_remote_code=True there), and pass hf_model=."
        )
    choose: Any = _get_model_class
    return choose(hf_config, mapping)


def configuration_for(model_class: Any, hf_config: Any) -> Any:
    """The part of a configuration that a class is built from: of a composite one, perhaps only its
    language model's.
    """
    text_class = (getattr(hf_config, "sub_configs", None) or {}).get("text_config")
    if text_class is not None and getattr(model_class, "config_class", None) == text_class:
        return hf_config.get_text_config()
    return hf_config


def _make_alive(model: nn.Module, dtype: torch.dtype) -> None:
    computed = _computed_weights(model)
    made: dict[int, LivePromise] = {}
    for prefix, module in model.named_modules():
        both: Any = ((module._parameters, True), (module._buffers, False))
        for tensors, is_parameter in both:
            for leaf, tensor in tensors.items():
                if not isinstance(tensor, Promise):
                    continue
                is_computed = not is_parameter or computed(f"{prefix}.{leaf}" if prefix else leaf)
                if is_computed and _is_missing(tensor):
                    empty = tensor.meta.to(dtype) if is_parameter else tensor.meta
                    tensors[leaf] = nn.Parameter(empty) if is_parameter else empty
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _alive(tensor, is_parameter, dtype)
                tensors[leaf] = made[id(tensor)]


def _computed_weights(model: Any) -> Callable[[str], bool]:
    """Whether transformers computes a weight that a checkpoint lacks, such as fixed positions."""
    patterns = [
        re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    ]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def _alive(promise: Promise, is_parameter: bool, dtype: torch.dtype) -> LivePromise:
    value: Any = promise
    if is_parameter and promise.is_floating_point():
        value = promise.to(dtype)
    made = LivePromise(value.node, value.meta, promise.device)
    made.requires_grad_(promise.is_trained and is_parameter)
    made._is_param = is_parameter
    return made


def _is_missing(promise: Promise) -> bool:
    return isinstance(promise.node, SourceView) and isinstance(promise.node.source, MissingSource)


def _compute_tables(model: Any) -> None:
    """Give what no file has (rotary tables, scales, fixed positions) its values, as transformers
    does when it has loaded a model.
    """
    wanted = {name: tensor for name, tensor in _tensors(model) if _is_empty(tensor)}
    if not wanted:
        return
    kept = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        with torch.no_grad(), Defaults(), SkipRandomInit():  # type: ignore[no-untyped-call]
            for module in model.modules():
                _empty(module)
            marks = {module: _mark_padding(module) for module in model.modules()}
            modules = list(_with_owners(model, model))
            # Each module's own tables first: the others may only be known further up.
            modules.sort(key=lambda found: not any(map(_is_unset, found[0]._buffers.values())))
            for module, owner in modules:
                owner._init_weights(module)
        made = dict(_tensors(model))
    finally:
        for module, parameters in kept:
            for leaf, parameter in parameters.items():
                if parameter is None or not _is_empty(parameter):
                    # Some are frozen by the rules for fresh values.
                    _freeze(parameter, module._parameters[leaf])
                    module._parameters[leaf] = parameter
    for module, mark in marks.items():
        if mark is not None and not mark[-1].any():
            _clear_padding(module)
    lost = [name for name in wanted if _is_unset(made[name])]
    if lost:
        raise UnsupportedArchitectureError(
            f"transformers {compat.TRANSFORMERS} does not say how {listed(lost)} of a "
            f"{type(model).__name__} are computed. Load it with transformers, and pass hf_model=."
        )


def _mark_padding(module: nn.Module) -> torch.Tensor | None:
    """Put a mark in place of a loaded embedding: it shows whether transformers' rules for fresh
    values clear the row of the padding all the same, as some do.
    """
    weight = module._parameters.get("weight")
    if not isinstance(module, nn.Embedding) or module.padding_idx is None or weight is None:
        return None
    if not weight.is_meta:
        return None
    mark = nn.Parameter(torch.ones(module.padding_idx + 1, 1), weight.requires_grad)
    mark._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' own flag
    module._parameters["weight"] = mark
    return mark


def _clear_padding(module: Any) -> None:
    weight, row = module._parameters["weight"], module.padding_idx
    with torch.no_grad():
        weight.data = torch.cat((weight[:row], torch.zeros_like(weight[:1]), weight[row + 1 :]))


def _freeze(parameter: torch.Tensor | None, like: torch.Tensor | None) -> None:
    if parameter is not None and like is not None and not like.requires_grad:
        parameter.requires_grad_(False)


def _asks_for_default_dtype(module: nn.Module) -> bool:
    """Whether a module's tables have the default dtype, which transformers sets to the model's
    while it builds one, and nobody sets here.
    """
    members = (getattr(member, "__func__", member) for member in vars(type(module)).values())
    return any(
        "get_default_dtype" in m.__code__.co_names for m in members if isinstance(m, FunctionType)
    )


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _is_empty(tensor: torch.Tensor) -> bool:
    return tensor.is_meta and not isinstance(tensor, Promise)


def _empty(module: nn.Module) -> None:
    """Put memory without values in place of what is to be computed, and nothing in place of weights
    that have values.
    """
    for leaf, buffer in module._buffers.items():
        if buffer is not None and _is_empty(buffer):
            module._buffers[leaf] = _unset(buffer)
    for leaf, parameter in module._parameters.items():
        if parameter is None:
            continue
        if _is_empty(parameter):
            made = _unset(parameter)
        else:
            made = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        module._parameters[leaf] = nn.Parameter(made, parameter.requires_grad)


def _with_owners(module: nn.Module, owner: Any) -> Iterator[tuple[nn.Module, Any]]:
    """Modules, each with the model whose rules for fresh values apply to it."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    yield module, owner
    for child in module.children():
        yield from _with_owners(child, owner)


def _unset(like: torch.Tensor) -> torch.Tensor:
    made = torch.empty_like(like, device="cpu")
    if made.is_floating_point():
        return made.fill_(float("nan"))
    return made.zero_() if made.dtype == torch.bool else made.fill_(torch.iinfo(made.dtype).min)


def _is_unset(tensor: torch.Tensor | None) -> bool:
    if tensor is None or tensor.is_meta or isinstance(tensor, Promise) or not tensor.numel():
        return False
    if tensor.is_floating_point():
        return bool(tensor.isnan().all())
    return tensor.dtype != torch.bool and bool((tensor == torch.iinfo(tensor.dtype).min).all())


def _set_configuration(
    model: Any, hf_config: Any, dtype: torch.dtype, attention: str | None
) -> None:
    config = model.config
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    for part in (config, *parts):
        if part is not None:
            setattr(part, compat.CONFIG_DTYPE_NAME, dtype)
    config._attn_implementation = attention or "eager"
    config.output_attentions = hf_config.output_attentions  # of the caller's model, it may be off
    model.name_or_path = config.name_or_path = hf_config.name_or_path


def _read_generation_config(model: Any, hf_config: Any, folder: Path | None) -> None:
    if not model.can_generate():
        return
    if folder is not None and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        return
    model.generation_config = GenerationConfig.from_model_config(hf_config)
