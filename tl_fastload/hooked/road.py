"""The road to a HookedTransformer."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformer_lens import HookedTransformerConfig

from tl_fastload.hooked import names, steps
from tl_fastload.hooked.architectures import SUPPORTED
from tl_fastload.hooked.convert import record_weights
from tl_fastload.hooked.devices import default_device
from tl_fastload.hooked.empty import build_empty, build_on_meta, device_map
from tl_fastload.hooked.layout import strides_in
from tl_fastload.hooked.official_names import aliases
from tl_fastload.hooked.record import record
from tl_fastload.placement.spread import Parts
from tl_fastload.placement.streaming import put_to_work
from tl_fastload.roads.road import Request, Road, Shared, TensorParallel, home_of


def _is_unused(name: str, cfg: Any) -> bool:
    # TransformerLens before 3 has no attention sinks.
    return name.endswith(".sinks") and not hasattr(cfg, "use_attention_sinks")


def _empty_model(
    request: Request, cfg: Any, notes: list[str], tokenizer: Any, *, built: Any, **keywords: Any
) -> Any:
    trust = request.keywords.trust_remote_code
    return build_empty(
        *(request.cls, cfg, notes, tokenizer),
        trust_remote_code=trust,
        move_to_device=False,
        **keywords,
    )


def _tensor_parallel() -> TensorParallel:
    module: Any = import_module("tl_fastload.hooked.parallel")  # older torch cannot import it
    found: TensorParallel = module
    return found


def _itself(model: Any) -> Any:
    return model


def _shared(model: Any) -> Shared:
    places = {name: home_of(model, name) for name, _ in model.named_parameters()}
    return Shared(model, model, False, {name: [home] for name, home in places.items()})


class HookedRoad:
    """What `tl_fastload.roads.road.Road` asks for."""

    name = "HookedTransformer"
    config_class = HookedTransformerConfig
    supported = SUPPORTED
    counts_devices = False
    moves_first = False
    aliases = staticmethod(aliases)
    record = staticmethod(record)
    record_weights = staticmethod(record_weights)
    empty_model = staticmethod(_empty_model)
    model_on_meta = staticmethod(lambda cls, cfg, built: build_on_meta(cls, cfg))
    finished = staticmethod(lambda model, device_of: model)
    shared = staticmethod(_shared)
    stored = staticmethod(_itself)
    settle = staticmethod(lambda held: None)
    tensor_parallel = staticmethod(_tensor_parallel)
    default_device = staticmethod(default_device)
    device_map = staticmethod(device_map)
    parts = staticmethod(Parts.of)
    put_to_work = staticmethod(put_to_work)
    strides_in = staticmethod(strides_in)
    why_skipped = staticmethod(steps.reason_to_skip)
    check_flags = staticmethod(steps.check_refactor)
    is_processed = staticmethod(steps.is_processed)
    steps_of = staticmethod(steps.steps_of)
    hf_config = staticmethod(lambda model: getattr(model, "_hf_config", None))
    role = staticmethod(names.role)
    roles_in = staticmethod(lambda model: names.role)
    folded_names = staticmethod(names.folded_names)
    is_unused = staticmethod(_is_unused)


ROAD: Road = HookedRoad()
