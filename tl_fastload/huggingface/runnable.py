"""A transformers model as its own `from_pretrained` returns it, with promises for its weights:
tables computed, generation settings read, in evaluation mode.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
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
from tl_fastload.recipes.nodes import SourceView
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
    _compute_tables(model)
    _set_configuration(model, hf_config, dtype, attention)
    if not hasattr(model, "generation_config"):
        _read_generation_config(model, hf_config, folder)
    model.eval()


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
    made: dict[int, LivePromise] = {}
    for module in model.modules():
        both: Any = ((module._parameters, True), (module._buffers, False))
        for tensors, is_parameter in both:
            for leaf, tensor in tensors.items():
                if not isinstance(tensor, Promise):
                    continue
                if not is_parameter and _is_missing(tensor):
                    tensors[leaf] = tensor.meta  # transformers computes what old files lack
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _alive(tensor, is_parameter, dtype)
                tensors[leaf] = made[id(tensor)]


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
    """Give buffers that no file has (rotary tables, scales) their values, as transformers does when
    it has loaded a model.
    """
    lost = []
    with torch.no_grad(), Defaults(), SkipRandomInit():  # type: ignore[no-untyped-call]
        for name, module, owner in _with_owners(model, "", model):
            buffers = {
                leaf: buffer
                for leaf, buffer in module._buffers.items()
                if buffer is not None and buffer.is_meta
            }
            if not buffers:
                continue
            for leaf, buffer in buffers.items():
                module._buffers[leaf] = _unset(buffer)
            _initialize(owner, module)
            lost += [
                f"{name}.{leaf}".lstrip(".") for leaf in buffers if _is_unset(module._buffers[leaf])
            ]
    if lost:
        raise UnsupportedArchitectureError(
            f"transformers {compat.TRANSFORMERS} does not say how {listed(lost)} of a "
            f"{type(model).__name__} are computed. Load it with transformers, and pass hf_model=."
        )


def _with_owners(module: nn.Module, name: str, owner: Any) -> Iterator[tuple[str, nn.Module, Any]]:
    """Modules by name, each with the model whose rules for fresh values apply to it."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    yield name, module, owner
    for leaf, child in module.named_children():
        yield from _with_owners(child, f"{name}.{leaf}" if name else leaf, owner)


def _initialize(owner: Any, module: nn.Module) -> None:
    kept = dict(module._parameters)
    for leaf, parameter in kept.items():
        if parameter is not None:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
    try:
        owner._init_weights(module)
    finally:
        module._parameters.update(kept)


def _unset(like: torch.Tensor) -> torch.Tensor:
    made = torch.empty_like(like, device="cpu")
    if made.is_floating_point():
        return made.fill_(float("nan"))
    return made.zero_() if made.dtype == torch.bool else made.fill_(torch.iinfo(made.dtype).min)


def _is_unset(buffer: torch.Tensor | None) -> bool:
    if buffer is None or buffer.numel() == 0 or buffer.dtype == torch.bool:
        return False
    if buffer.is_floating_point():
        return bool(buffer.isnan().all())
    return bool((buffer == torch.iinfo(buffer.dtype).min).all())


def _set_configuration(
    model: Any, hf_config: Any, dtype: torch.dtype, attention: str | None
) -> None:
    config = model.config
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    for part in (config, *parts):
        if part is not None:
            setattr(part, compat.CONFIG_DTYPE_NAME, dtype)
    if attention is not None and attention != "eager":
        config._attn_implementation = attention
    model.name_or_path = config.name_or_path = hf_config.name_or_path


def _read_generation_config(model: Any, hf_config: Any, folder: Path | None) -> None:
    if not model.can_generate():
        return
    if folder is not None and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        return
    model.generation_config = GenerationConfig.from_model_config(hf_config)
