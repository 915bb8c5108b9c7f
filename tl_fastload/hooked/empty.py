"""The empty model that weights are placed into, and the device of each of its parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tl_fastload.ground.borrow import silenced
from tl_fastload.hooked.config_repairs import differences
from tl_fastload.hooked.devices import device_of_block
from tl_fastload.hooked.names import role
from tl_fastload.hooked.rope_tables import put_rope_tables
from tl_fastload.hooked.tokenizer import own_tokenizer, warn_of_ids, with_bos
from tl_fastload.huggingface.empty import SkipInitializers, SkipRandomInit
from tl_fastload.huggingface.tokenizer import is_failure, lost_tokenizer


def build_empty(
    cls: type,
    cfg: Any,
    notes: list[str],
    tokenizer: Any = None,
    *args: Any,
    hf_config: Any = None,
    trust_remote_code: bool = False,
    tokenizer_folder: Callable[[], AbstractContextManager[Path | None]] = nullcontext,
    hub: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Build the model class with untouched memory for parameters.

    Args:
        cls: the model class.
        cfg: its HookedTransformerConfig.
        notes: gets what the report has to say, such as that no tokenizer was found.
        tokenizer: the caller's tokenizer, or None.
        *args: for the class.
        hf_config: transformers' configuration of the model, or None.
        trust_remote_code: whether code that comes with a tokenizer may run.
        tokenizer_folder: has the tokenizer's files in a folder while it is read; None to look for
            the tokenizer by its name.
        hub: keyword arguments that say how to reach the hub.
        **kwargs: for the class.
    """
    # Code of a checkpoint runs only if the caller allowed it, whatever TransformerLens' tables say.
    wanted = cfg.trust_remote_code
    cfg.trust_remote_code = trust_remote_code
    is_own = tokenizer is None and cfg.tokenizer_name is not None
    try:
        if is_own:
            tokenizer = _own_tokenizer(cfg, tokenizer_folder, dict(hub or {}), notes)
        prepared = None if tokenizer is None else with_bos(tokenizer, cfg)
        with SkipRandomInit():  # type: ignore[no-untyped-call]
            model = _construct(cls, cfg, notes, prepared, is_own, *args, **kwargs)
    finally:
        cfg.trust_remote_code = wanted
    _as_transformers(model, hf_config, notes)
    warn_of_ids(model)
    if _give_experts_the_dtype(model):
        notes.append(
            f"Expert layers are {cfg.dtype}, as asked for. TransformerLens makes them float32 "
            "whatever dtype says, and its forward pass then fails."
        )
    return model


def build_on_meta(
    cls: type, cfg: Any, notes: list[str] | None = None, hf_config: Any = None
) -> Any:
    """Build the model class on the meta device, without a tokenizer: shapes and dtypes only.

    The arguments are those of `build_empty`.
    """
    cfg.tokenizer_name = None
    model: Any = object.__new__(cls)
    with torch.device("meta"), SkipInitializers():
        # Of a class with an `__init__` of its own, what it calls says what it says.
        silenced(model.__init__)(cfg, None, move_to_device=False)
    _as_transformers(model, hf_config, [] if notes is None else notes)
    _give_experts_the_dtype(model)
    return model


def _as_transformers(model: Any, hf_config: Any, notes: list[str]) -> None:
    """Tables that are transformers', and words on what cannot be."""
    if hf_config is not None and model.cfg.original_architecture is not None:
        notes += differences(vars(model.cfg), hf_config)
        notes += put_rope_tables(model, hf_config)


def _give_experts_the_dtype(model: Any) -> bool:
    changed = False
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype != model.cfg.dtype:
            for name, parameter in list(module.named_parameters(recurse=False)):
                empty = torch.empty_like(parameter, dtype=model.cfg.dtype)
                setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
            changed = True
    return changed


def _own_tokenizer(
    cfg: Any,
    folder: Callable[[], AbstractContextManager[Path | None]],
    hub: dict[str, Any],
    notes: list[str],
) -> Any:
    """The tokenizer that lies with the model. The weights do not need it: token ids still work."""
    try:
        # The files of this revision and cache; the name alone would mean the usual ones.
        with folder() as files:
            return own_tokenizer(cfg, files, hub, trust=cfg.trust_remote_code)
    except BaseException as error:  # tokenizers raise anything at all
        if not is_failure(error):
            raise
        notes.append(lost_tokenizer(cfg.tokenizer_name, error))
        cfg.tokenizer_name = None
        return None


def _construct(
    cls: type, cfg: Any, notes: list[str], tokenizer: Any, is_own: bool, *args: Any, **kwargs: Any
) -> Any:
    try:
        return cls(cfg, tokenizer, *args, **kwargs)
    except BaseException as error:  # a panic of code in Rust is no `Exception`
        if tokenizer is None or not is_failure(error):
            raise
        failed = error
    # The weights do not need the tokenizer: token ids still work. Whether it was the tokenizer that
    # failed shows now: without it, anything else fails again.
    name, cfg.tokenizer_name = cfg.tokenizer_name, None
    model = cls(cfg, None, *args, **without_side(kwargs))
    notes.append(lost_tokenizer(name if is_own else "tokenizer=", failed))
    return model


def without_side(keywords: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a model class for a model without a tokenizer."""
    return {name: value for name, value in keywords.items() if name != "default_padding_side"}


def device_map(model: Any, move_to_device: bool) -> Callable[[str], torch.device]:
    """Where each parameter goes.

    With several devices, blocks are spread as the forward pass expects them, the embedding lies
    with the first block and the final norm and unembedding with the last.
    """
    cfg = model.cfg
    is_host = not move_to_device or cfg.device is None
    if is_host or cfg.n_devices <= 1:
        only = torch.device("cpu" if is_host else cfg.device)
        return lambda name: only

    used = {str(device_of_block(index, cfg)) for index in range(cfg.n_layers)}
    if len(used) < cfg.n_devices:
        warnings.warn(
            f"n_devices={cfg.n_devices} leaves {cfg.n_devices - len(used)} idle: "
            f"{cfg.n_layers} layers lie on {', '.join(sorted(used))}.",
            stacklevel=2,
        )

    def device_of(name: str) -> torch.device:
        place = role(name)
        index = cfg.n_layers - 1 if place.is_last else place.layer or 0
        return torch.device(device_of_block(index, cfg))

    return device_of
