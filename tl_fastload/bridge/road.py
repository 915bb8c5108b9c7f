"""The road to a TransformerBridge."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch

from tl_fastload.bridge import copied, names, steps, versions
from tl_fastload.bridge.convert import record_weights
from tl_fastload.bridge.parts import parts_of
from tl_fastload.bridge.placing import roles_in, strides_in
from tl_fastload.bridge.record import record
from tl_fastload.huggingface.config import Supported
from tl_fastload.placement.spread import Spread
from tl_fastload.placement.streaming import put_to_work
from tl_fastload.roads.road import Road, TensorParallel


def _why_not(name: str, model_type: str, is_seq2seq: bool) -> str:
    return "is not an architecture that TransformerBridge has an adapter for."


def _device_map(model: Any, move_to_device: bool) -> Callable[[str], torch.device]:
    device = torch.device(model.cfg.device if move_to_device else "cpu")
    return lambda name: device


def _default_device() -> str:
    return str(import_module("transformer_lens.utilities").get_device())


def _finished(model: Any, device_of: Callable[[str], torch.device]) -> Any:
    return model.finish(device_of)


def _put_to_work(model: Any, spread: Spread | None) -> None:
    put_to_work(model, spread, model.original_model)


def _hf_config(model: Any) -> Any:
    # As it was loaded: with all layers, and with what is said of quantized weights.
    return model.__dict__.get("_hf_config") or model.original_model.config


def _folded_names(model: Any) -> list[str]:
    return []  # a bridge keeps the modules of norms that it has folded, with their weights


_SUPPORTED = Supported(tuple(sorted(versions.adapters())), _why_not)


def _tensor_parallel() -> TensorParallel:
    module: Any = import_module("tl_fastload.bridge.parallel")
    found: TensorParallel = module
    return found


class BridgeRoad:
    """What `tl_fastload.roads.road.Road` asks for."""

    name = "TransformerBridge"
    supported = _SUPPORTED
    counts_devices = True
    moves_first = True
    aliases = staticmethod(versions.aliases)
    record = staticmethod(record)
    record_weights = staticmethod(record_weights)
    empty_model = partial(copied.empty_model, supported=_SUPPORTED)
    model_on_meta = staticmethod(copied.on_meta)
    finished = staticmethod(_finished)
    shared = staticmethod(lambda held: held.shared_model)
    stored = staticmethod(copied.stored)
    settle = staticmethod(copied.StoredShelf.settle)
    tensor_parallel = staticmethod(_tensor_parallel)
    default_device = staticmethod(_default_device)
    device_map = staticmethod(_device_map)
    parts = staticmethod(parts_of)
    put_to_work = staticmethod(_put_to_work)
    strides_in = staticmethod(strides_in)
    why_skipped = staticmethod(steps.why_skipped)
    check_flags = staticmethod(steps.check_flags)
    steps_of = staticmethod(steps.steps_of)
    hf_config = staticmethod(_hf_config)
    is_processed = staticmethod(lambda model, flags: versions.is_processed(model))
    role = staticmethod(names.role)
    roles_in = staticmethod(roles_in)
    folded_names = staticmethod(_folded_names)
    is_unused = staticmethod(lambda name, cfg: False)

    @property
    def config_class(self) -> type:
        found: type = import_module("transformer_lens.config").TransformerBridgeConfig
        return found


ROAD: Road = BridgeRoad()
