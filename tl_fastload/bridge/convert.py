"""Weights in Hugging Face's naming for a live bridge: TransformerLens' boot and processing, as they
were done to it, run on their promises.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from tl_fastload.bridge import versions
from tl_fastload.bridge.copied import StoredShelf, apart, by_name, stored
from tl_fastload.bridge.record import BOOT_ARGUMENTS, COMPATIBILITY, PROCESSED, boot_and_process
from tl_fastload.bridge.slots import Slot, slots_of
from tl_fastload.errors import ArgumentError, MissingWeightsError
from tl_fastload.ground.hf_configs import text_config
from tl_fastload.ground.words import listed
from tl_fastload.huggingface.pretrained import Pretrained
from tl_fastload.placement.own_values import as_promise
from tl_fastload.quantized.recipes import reads_quantized
from tl_fastload.recipes.live import LivePromise
from tl_fastload.recipes.promise import Promise
from tl_fastload.request.contradictions import CHECKPOINT_ARGUMENTS
from tl_fastload.request.options import Options
from tl_fastload.roads.known import road_of
from tl_fastload.roads.road import Recording, Request


def record_weights(model: Any, pretrained: Pretrained, flags: Mapping[str, bool]) -> Recording:
    """As `tl_fastload.roads.road.Road.record_weights`.

    Raises:
        ArgumentError: the bridge is not what TransformerLens boots any more.
        MissingWeightsError: what is one memory in the bridge is two weights here.
    """
    shelf = stored(model)
    request = _as_it_stands(model, pretrained, flags)
    pretrained.config = copy.deepcopy(model.original_model.config)
    bridge, inputs, notes = boot_and_process(request, pretrained, is_quiet=True)
    slots = by_name(slots_of(bridge))
    changed = apart(slots, shelf.built["slots"])
    if changed and pretrained.ledger.fits:
        raise ArgumentError(
            f"The bridge is not built as TransformerLens boots it any more ({listed(changed, 5)}), "
            "so that nobody knows where weights go. Load it anew from these weights."
        )
    recipes = _recipes(shelf, slots, pretrained)
    shifts = inputs.shifts(recipes, flags)
    for slot in slots.values():
        slot.tensor = None  # promises live as long as they are needed
    return Recording(shelf, dict(flags), pretrained, recipes, shifts, notes)


def _as_it_stands(bridge: Any, pretrained: Pretrained, flags: Mapping[str, bool]) -> Request:
    """The call that would load a bridge like this one from other weights."""
    chosen = dict.fromkeys((*BOOT_ARGUMENTS, *CHECKPOINT_ARGUMENTS))
    chosen |= dict.fromkeys(("first_n_layers", "default_prepend_bos", "default_padding_side"))
    n_layers = text_config(bridge.original_model.config).num_hidden_layers
    if text_config(pretrained.config).num_hidden_layers > n_layers:
        chosen["first_n_layers"] = n_layers
    arguments = {
        **chosen,
        **flags,
        "model_name": bridge.cfg.model_name,
        "model_class": type(bridge.original_model),
        "dtype": bridge.cfg.dtype,
        "device": "cpu",
        "move_to_device": True,
        COMPATIBILITY: bool(bridge.compatibility_mode),
        PROCESSED: versions.is_processed(bridge),
    }
    return Request(type(bridge), road_of(bridge), Options(), arguments, pretrained.keywords)


def _recipes(
    shelf: StoredShelf, slots: Mapping[str, Slot], pretrained: Pretrained
) -> dict[str, Promise]:
    """What goes into each memory of the live bridge."""
    recipes: dict[str, Promise] = {}
    torn = []
    for name, form in shelf.built["slots"].items():
        promise = slots[name].tensor if name in slots else None
        if not isinstance(promise, LivePromise):
            if promise is not None and promise.is_floating_point() and form["memory"] == name:
                recipes[name] = as_promise(promise, name)  # such as a bias that was folded away
            continue
        promise.require_fresh()
        if form["memory"] == name:
            recipes[name] = Promise(promise.node, promise.meta, promise.device)
        elif not _is_part(promise, slots[form["memory"]].tensor, form):
            torn.append(f"{name} and {form['memory']}")
    if torn and pretrained.ledger.fits:
        raise MissingWeightsError(
            f"{listed(torn, 5)} are one memory in the bridge, and weights of their own in "
            f"{pretrained.label}. The bridge is as it was. Load it anew from these weights."
        )
    return recipes


def _is_part(promise: LivePromise, whole: Any, form: Mapping[str, Any]) -> bool:
    """Whether a promise lies in the memory of another one as its slot does in the live bridge."""
    meta = promise.meta
    place = [list(meta.shape), list(meta.stride()), int(meta.storage_offset())]
    if not isinstance(whole, LivePromise) or whole.home is not promise.home:
        return False
    # Quantized matrices lie the other way round, in the same parts.
    is_placed = place == [form["shape"], form["strides"], form["offset"]]
    return is_placed or reads_quantized(whole.node)
