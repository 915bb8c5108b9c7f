"""A transformers model as its own `from_pretrained` returns it, with promises for its weights: tables
computed, generation settings read, in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from tl_fastload.errors import UnsupportedArchitectureError
from tl_fastload.ground import compat
from tl_fastload.ground.own_defaults import Defaults
from tl_fastload.ground.words import listed
from tl_fastload.huggingface.empty import SkipRandomInit, empty_model
from tl_fastload.huggingface.keys import Ledger
from tl_fastload.huggingface.tree import MissingSource, fill_tree
from tl_fastload.quantized.assemble import combine, refuse_undeclared
from tl_fastload.quantized.spec import Spec
from tl_fastload.recipes.live import LivePromise
from tl_fastload.recipes.nodes import SourceView
from tl_fastload.recipes.promise import Promise


def runnable_model(
    model_class: Any,
    hf_config: Any,
    promises: Mapping[str, Promise],
    dtype: torch.dtype,
    folder: Path | None,
    attention: str | None = None,
    spec: Spec | None = None,
) -> tuple[Any, Ledger]:
    """Build a transformers model on promises.

    Args:
        model_class: its class.
        hf_config: its configuration; not changed.
        promises: the checkpoint's tensors, by the names of its files.
        dtype: of its parameters.
        folder: where `generation_config.json` lies, if there is one; None takes the settings from
            the configuration.
        attention: which of transformers' implementations of attention it uses; None takes "eager".
        spec: how the checkpoint is quantized, if it is.

    Returns:
        The model, whose tensors are `LivePromise`s or computed tables, and what of the checkpoint
        did not fit.

    Raises:
        UnsupportedArchitectureError: a table cannot be computed.
    """
    if spec is None:
        refuse_undeclared(promises)
    else:
        promises = combine(promises, spec, dtype)
    model = empty_model(model_class, hf_config, dtype)
    trainable = {
        name: parameter.requires_grad
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    ledger = fill_tree(model, promises, dtype)
    _make_alive(model, trainable)
    _compute_tables(model)
    _set_configuration(model, hf_config, dtype, attention)
    _read_generation_config(model, hf_config, folder)
    model.eval()
    return model, ledger


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
    return _get_model_class(hf_config, mapping)


def configuration_for(model_class: Any, hf_config: Any) -> Any:
    """The part of a configuration that a class is built from: of a composite one, perhaps only its
    language model's.
    """
    text_class = (getattr(hf_config, "sub_configs", None) or {}).get("text_config")
    if text_class is not None and getattr(model_class, "config_class", None) == text_class:
        return hf_config.get_text_config()
    return hf_config


def _make_alive(model: nn.Module, trainable: Mapping[str, bool]) -> None:
    made: dict[int, LivePromise] = {}
    for prefix, module in model.named_modules():
        for kind in (module._parameters, module._buffers):
            tensors: dict[str, Any] = kind  # type: ignore[assignment]
            for leaf, tensor in tensors.items():
                if not isinstance(tensor, Promise):
                    continue
                if kind is module._buffers and _is_missing(tensor):
                    tensors[leaf] = tensor.meta  # transformers computes what old files lack
                    continue
                name = f"{prefix}.{leaf}" if prefix else leaf
                if id(tensor) not in made:
                    made[id(tensor)] = LivePromise.in_place_of(tensor, trainable.get(name, False))
                    made[id(tensor)]._is_param = kind is module._parameters
                tensors[leaf] = made[id(tensor)]


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
