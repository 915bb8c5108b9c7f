"""A bridge in a processed copy: which memory each of its tensors is, and the bridge built anew
around what was saved.

A copy holds each memory once. What a bridge looks like around it (modules, hooks, aliases) is made
by TransformerLens' boot and processing, on promises that are never evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tl_fastload.bridge import versions
from tl_fastload.bridge.placing import Shelf
from tl_fastload.bridge.quantizing import role_in
from tl_fastload.bridge.record import COMPATIBILITY, PROCESSED, boot_and_process, completed
from tl_fastload.bridge.sharing import part_copy
from tl_fastload.bridge.slots import ATTRIBUTE, Slot, is_plain, slots_of
from tl_fastload.errors import ArgumentError, CheckpointError
from tl_fastload.ground.geometry import dense_strides
from tl_fastload.ground.role import Role
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.ground.words import listed
from tl_fastload.huggingface.config import Supported
from tl_fastload.huggingface.pretrained import Pretrained
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.request.contradictions import CHECKPOINT_ARGUMENTS
from tl_fastload.roads.road import Request
from tl_fastload.source.reader import FileReader
from tl_fastload.source.schemas import FLAG, OFFSET, OFFSETS, TEXT, Rule, check, table_of

_FORM = Rule(
    "the form of a tensor",
    lambda form: (
        isinstance(form, dict)
        and all(TEXT.fits(form.get(name)) for name in ("memory", "same"))
        and all(OFFSETS.fits(form.get(name)) for name in ("shape", "strides"))
        and all(OFFSET.fits(form.get(name)) for name in ("kind", "offset"))
        and all(FLAG.fits(form.get(name)) for name in ("is_parameter", "requires_grad"))
    ),
)
_REBUILT = ("device", "tokenizer_name", "init_weights", "trust_remote_code")
"""Fields of a configuration that are the new bridge's own."""


class StoredShelf(Shelf):
    """The memories of a bridge, each once, under the name of its first slot.

    Attributes:
        cfg: the bridge's.
        built: what a copy says of the bridge; "slots" has for each slot its memory and its form.
        slots: of a live bridge, by name.
    """

    def __init__(
        self, cfg: Any, built: dict[str, Any], slots: Mapping[str, Slot] | None = None
    ) -> None:
        super().__init__()
        self.cfg, self.built, self.slots = cfg, built, slots or {}

    def aliases(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, form in self.built["slots"].items():
            if form["is_parameter"]:
                found.setdefault(form["memory"], []).append(name)
        return found

    def role(self, name: str) -> Role:
        slot = self.slots.get(name)
        return super().role(name) if slot is None else role_in(name, slot.module, self.slots)

    def settle(self) -> None:
        """As `tl_fastload.roads.road.Road.settle`: quantized memory has other bytes in its place
        when it was written to.
        """
        for name, form in self.built["slots"].items():
            whole, part = self.slots[form["memory"]].tensor, self.slots[name].tensor
            if isinstance(part, QuantizedTensor) and part.content is not whole.content:
                part.become(_view_of_bytes(whole, form))


def stored(bridge: Any) -> StoredShelf:
    """As `tl_fastload.roads.road.Road.stored`."""
    slots = by_name(slots_of(bridge))
    forms: dict[str, Any] = {}
    built = {
        "road": "TransformerBridge",
        "compatibility": bool(bridge.compatibility_mode),
        "processed": versions.is_processed(bridge),
        "slots": forms,
    }
    shelf = StoredShelf(bridge.cfg, built, slots)
    shelf._hf_config = bridge.original_model.config
    homes: dict[tuple[int, ...], dict[str, Slot]] = {}
    for name, slot in slots.items():  # attributes last
        memory = _memory(slot.tensor)
        # A private attribute with memory of its own is what a forward pass has left, as a pattern.
        if slot.kind != ATTRIBUTE or memory in homes or not slot.leaf.startswith("_"):
            homes.setdefault(memory, {})[name] = slot
    for entries in homes.values():
        whole = next((name for name, slot in entries.items() if _fills(slot.tensor)), None)
        first: dict[int, str] = {}
        for name, slot in entries.items():
            home = first.setdefault(id(slot.tensor), name) if whole is None else whole
            same = first.setdefault(id(slot.tensor), name)
            forms[name] = _form(slot, home, same, offset=whole is not None)
        for name in first.values() if whole is None else (whole,):
            _store(shelf, name, slots[name].tensor)
    return shelf


def by_name(slots: list[Slot]) -> dict[str, Slot]:
    """Slots by the names that a copy has for them: no two are the same."""
    found: dict[str, Slot] = {}
    for slot in slots:
        name = slot.name
        while name in found:
            name += "_"  # two modules under one name
        found[name] = slot
    return found


def _memory(tensor: torch.Tensor) -> tuple[int, ...]:
    if isinstance(tensor, QuantizedTensor):
        # Rows that lie in the bytes of a fused matrix have a geometry of their own.
        bytes_ = next(iter(tensor.content.tensors().values()))
        return int(bytes_.data_ptr()), *tensor.content.stored.shape
    return (int(tensor.untyped_storage()._cdata),)


def _fills(tensor: torch.Tensor) -> bool:
    if isinstance(tensor, QuantizedTensor):
        return bool(tensor.numel() == torch.Size(tensor.content.stored.shape).numel())
    return is_plain(tensor) and tensor.untyped_storage().nbytes() == bytes_of(tensor)


def _form(slot: Slot, home: str, same: str, *, offset: bool) -> dict[str, Any]:
    tensor, is_parameter = slot.tensor, isinstance(slot.tensor, nn.Parameter)
    return {
        "memory": home,
        "same": same,
        "kind": slot.kind,
        "shape": list(tensor.shape),
        "strides": list(tensor.stride()) if offset else list(dense_strides(tensor.to("meta"))),
        "offset": int(tensor.storage_offset()) if offset else 0,
        "is_parameter": is_parameter,
        "requires_grad": bool(tensor.requires_grad),
    }


def _store(shelf: StoredShelf, name: str, tensor: torch.Tensor) -> None:
    strides = tuple(tensor.stride())
    if not isinstance(tensor, QuantizedTensor):
        strides = strides if is_plain(tensor) else dense_strides(tensor.to("meta"))
    made = shelf.put(name, tensor if isinstance(tensor, nn.Parameter) else tensor.detach(), strides)
    assert made == name


def on_meta(
    cls: type, cfg: Any, built: Mapping[str, Any] | None, is_shared: bool = False
) -> StoredShelf:
    """As `tl_fastload.roads.road.Road.model_on_meta`: the memories that a copy holds. Parts of them
    are row-major.
    """
    shelf = StoredShelf(cfg, dict(built or {}))
    for name, form in shelf.built.get("slots", {}).items():
        if form["memory"] == name:
            strides = tuple(form["strides"])
            tensor = torch.empty_strided(form["shape"], strides, dtype=cfg.dtype, device="meta")
            tensor = nn.Parameter(tensor, form["requires_grad"]) if form["is_parameter"] else tensor
            shelf.put(name, tensor, () if is_shared else strides)
    return shelf


def empty_model(
    request: Request,
    cfg: Any,
    notes: list[str],
    tokenizer: Any,
    *,
    hf_config: Any,
    built: Mapping[str, Any] | None,
    supported: Supported,
    **keywords: Any,
) -> Shelf:
    """As `tl_fastload.roads.road.Road.empty_model`: what is filled in place of the bridge, and
    whose `finish` gives it.
    """
    label = str(request.arguments["model_name"])
    if built is not None:
        rules = {"compatibility": FLAG, "processed": FLAG, "slots": table_of(_FORM)}
        check(built, rules, f"{label} is damaged, built", "Save the copy again.")
    if built is None or hf_config is None:
        raise CheckpointError(
            f"{label} has no configuration of transformers' that this version can read, and no "
            "bridge can be built without. Load the original."
        )
    _check_mode(request, built, label)
    mode = {COMPATIBILITY: built["compatibility"], PROCESSED: built["processed"]}
    request = request.changed(**mode)
    bridge = _built(request, cfg, tokenizer, hf_config, supported, label)
    _as_saved(bridge, cfg)
    if "default_padding_side" in keywords and bridge.tokenizer is not None:
        bridge.tokenizer.padding_side = keywords["default_padding_side"]
    slots = by_name(slots_of(bridge))
    wrong = apart(slots, built["slots"])
    if wrong:
        raise CheckpointError(
            f"{label} does not hold the bridge that TransformerLens builds here: "
            f"{listed(wrong, 10)}. Load it with the class and versions that saved it, or load the "
            "original."
        )
    is_shared = request.options.mesh is not None
    shelf = on_meta(request.cls, bridge.cfg, built, is_shared)
    if is_shared:
        part_copy(shelf, bridge, slots)
    shelf.finish = lambda device_of: _filled(bridge, slots, shelf, device_of)
    return shelf


def _check_mode(request: Request, built: Mapping[str, Any], label: str) -> None:
    asked = bool(request.arguments.get(COMPATIBILITY, True))
    # One whose weights alone were processed comes back as it was.
    if asked != (built["compatibility"] or built["processed"]):
        how = "from_pretrained_lean" if not asked else "boot_transformers_lean"
        raise ArgumentError(
            f"{label} was saved {'without' if asked else 'in'} compatibility "
            f"mode: load it with {request.cls.__name__}.{how}."
        )


def _built(
    request: Request, cfg: Any, tokenizer: Any, hf_config: Any, supported: Supported, label: str
) -> Any:
    """The bridge on promises, whose weights are nowhere."""
    chosen = dict.fromkeys((*CHECKPOINT_ARGUMENTS, "hf_model", "first_n_layers", "n_ctx"))
    chosen |= dict.fromkeys(("default_prepend_bos", "default_padding_side"))
    as_saved = {**chosen, "dtype": cfg.dtype, "device": str(cfg.device), "tokenizer": tokenizer}
    changed = replace(request, arguments={**request.arguments, **as_saved})
    pretrained = Pretrained.of_weights(label, {}, hf_config, supported, FileReader())
    pretrained.keywords = request.keywords
    return boot_and_process(changed, pretrained, is_quiet=True)[0]


def _as_saved(bridge: Any, cfg: Any) -> None:
    """Put the fields of the configuration right that somebody has changed since the boot."""
    for name, value in vars(cfg).items():
        if not name.startswith("_") and name not in _REBUILT:
            own = getattr(bridge.cfg, name, None)
            if (list(own) if isinstance(own, tuple) else own) != value:
                setattr(bridge.cfg, name, value)


def apart(slots: Mapping[str, Slot], saved: Mapping[str, Any]) -> list[str]:
    """In which tensors a bridge that was built differs from what `stored` said of one, sorted."""
    wrong = [
        f"new in the bridge: {name}"
        for name, slot in slots.items()
        if name not in saved and (slot.kind != ATTRIBUTE or type(slot.tensor) is not torch.Tensor)
    ]
    for name, form in saved.items():
        if name not in slots:
            wrong += [f"not in the bridge: {name}"] if form["kind"] != ATTRIBUTE else []
        elif list(slots[name].tensor.shape) != form["shape"]:
            shape = list(slots[name].tensor.shape)
            wrong.append(f"{name} was {form['shape']}, and is {shape} in the bridge")
    return sorted(wrong)


def _filled(
    bridge: Any,
    slots: Mapping[str, Slot],
    shelf: StoredShelf,
    device_of: Callable[[str], torch.device],
) -> Any:
    tensors = {**dict(shelf.named_parameters()), **dict(shelf.named_buffers())}
    made: dict[str, torch.Tensor] = {}
    for name, places in shelf.shared_model.places.items() if shelf.is_shared else ():
        for module, leaf in places:
            module._parameters[leaf] = shelf.get_parameter(name)
    for name, form in shelf.built["slots"].items():
        if shelf.is_shared and form["memory"] in shelf.shared_model.places:
            continue
        if form["same"] not in made:
            whole = tensors[form["memory"]]
            made[form["same"]] = whole if form["memory"] == name else _view(whole, form)
        if name in slots:
            slots[name].tensor = made[form["same"]]
    return completed(bridge, device_of)


def _view(whole: torch.Tensor, form: Mapping[str, Any]) -> torch.Tensor:
    if isinstance(whole, QuantizedTensor):
        view: torch.Tensor = _view_of_bytes(whole, form)
    else:
        offset = whole.storage_offset() + form["offset"]
        view = whole.detach().as_strided(form["shape"], form["strides"], offset)
    return nn.Parameter(view, form["requires_grad"]) if form["is_parameter"] else view


def _view_of_bytes(whole: QuantizedTensor, form: Mapping[str, Any]) -> QuantizedTensor:
    place = torch.Size(form["shape"]), tuple(form["strides"]), form["offset"]
    return QuantizedTensor.of_view(whole.content, *place, whole.dtype)
