"""Telling a lean bridge and stock's apart: every difference, as sentences."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.support import bridge_zoo
from tests.support.bridge_stock import quiet

Tensors = dict[str, torch.Tensor]


@dataclass
class Snapshot:
    """What a bridge is at one moment; tensors are copies.

    tensors: parameters and buffers by the first path to each. alike: paths of one tensor.
    logits, cache: of one forward pass; activations in the order in which the hooks fired.
    """

    tensors: Tensors
    alike: set[frozenset[str]]
    modules: dict[str, tuple[str, bool]]
    names: dict[str, list[str]]
    cfg: dict[str, Any]
    hf_config: dict[str, Any]
    logits: torch.Tensor | None
    cache: dict[str, Any]


def snapshot(bridge: Any, case_id: str, *, forward: bool = True) -> Snapshot:
    """Everything that a lean bridge must share with stock's, its numbers among it.

    forward: without, there are no logits and no cache, for models that cannot run.
    """
    first, others = bridge_zoo.inputs(case_id, bridge.cfg.dtype)
    logits, cache = None, {}
    # Aliases of hooks warn each time that somebody looks them up.
    with quiet(), torch.no_grad():
        if forward:
            logits, cache = bridge.run_with_cache(first, **others)
        found = dict(tensors_of(bridge))
        names = {
            "state_dict": list(bridge.state_dict()),
            "parameters": [name for name, _ in bridge.named_parameters()],
            "hook_dict": list(bridge.hook_dict),
        }
    same: dict[int, list[str]] = {}
    for path, tensor in found.items():
        same.setdefault(id(tensor), []).append(path)
    copies = {
        path: tensor.detach().clone().requires_grad_(tensor.requires_grad)
        for path, tensor in found.items()
    }
    return Snapshot(
        copies,
        {frozenset(paths) for paths in same.values()},
        {path: (type(module).__name__, module.training) for path, module in modules_of(bridge)},
        names,
        {name: value for name, value in vars(bridge.cfg).items() if _is_plain(value)},
        bridge.original_model.config.to_dict(),
        logits,
        dict(cache),
    )


def _is_plain(value: object) -> bool:
    plain = (type(None), bool, int, float, str, torch.dtype, torch.device)
    if isinstance(value, (list, tuple)):
        return all(_is_plain(part) for part in value)
    if isinstance(value, dict):
        return all(_is_plain(part) for part in value.values())
    return isinstance(value, plain)


def modules_of(bridge: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the bridge and of the model that it wraps, by the first path to it."""
    seen: set[int] = {id(bridge)}
    waiting = [("original_model", bridge.original_model), ("", bridge)]
    while waiting:
        path, module = waiting.pop()
        if path:
            yield path, module
        for name, child in reversed(list(module._modules.items())):
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append((f"{path}.{name}" if path else name, child))


def tensors_of(bridge: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, persistent or not, of all modules: one that is in two, twice."""
    for path, module in modules_of(bridge):
        for kind in (module._parameters, module._buffers):
            for leaf, tensor in kind.items():
                if tensor is not None:
                    yield f"{path}.{leaf}", tensor


def differences(wanted: Snapshot, found: Snapshot) -> list[str]:
    """Everything in which two bridges differ, bit for bit: none, if the lean one is right."""
    return [
        *_names_apart(wanted, found),
        *_tensors_apart(wanted.tensors, found.tensors),
        *_dicts_apart("module", wanted.modules, found.modules),
        *_dicts_apart("cfg", wanted.cfg, found.cfg),
        *_dicts_apart("config", wanted.hf_config, found.hf_config),
        *_activations_apart(wanted, found),
    ]


def _names_apart(wanted: Snapshot, found: Snapshot) -> Iterator[str]:
    for what, names in wanted.names.items():
        if names != found.names[what]:
            apart = sorted(set(names) ^ set(found.names[what]))
            yield f"{what}: other names or order: {apart[:8]}"
    if wanted.alike != found.alike:
        ties = sorted(map(sorted, wanted.alike ^ found.alike))
        yield f"other tensors are one and the same: {ties[:8]}"


def _tensors_apart(wanted: Tensors, found: Tensors) -> Iterator[str]:
    if wanted.keys() != found.keys():
        yield f"other tensors: {sorted(wanted.keys() ^ found.keys())[:8]}"
    for name in wanted.keys() & found.keys():
        one, other = wanted[name], found[name]
        for what in ("shape", "dtype", "device", "requires_grad"):
            if getattr(one, what) != getattr(other, what):
                yield f"{name}: {what} {getattr(other, what)}, not {getattr(one, what)}"
        if one.shape == other.shape and not same_bits(one, other):
            apart = (one.double() - other.double()).abs().max()
            yield f"{name}: values up to {apart:.1e} apart"


def _activations_apart(wanted: Snapshot, found: Snapshot) -> Iterator[str]:
    if wanted.logits is None or found.logits is None:
        return
    if not same_bits(wanted.logits, found.logits):
        yield f"logits: up to {(wanted.logits - found.logits).abs().max():.1e} apart"
    if list(wanted.cache) != list(found.cache):
        apart = sorted(wanted.cache.keys() ^ found.cache.keys())
        yield f"cache: other entries or order: {apart[:8]}"
    for name in wanted.cache.keys() & found.cache.keys():
        if not same_values(wanted.cache[name], found.cache[name]):
            yield f"cache: {name} is not the same"


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether dtype, shape and all values are the same; not-a-number is itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    one, other = one.detach(), other.detach()
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def same_values(one: object, other: object) -> bool:
    """`same_bits` for what a hook caches: a tensor, or parts that hold some."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and same_bits(one, other)
    if isinstance(one, (list, tuple)):
        return (
            type(one) is type(other)
            and len(one) == len(other)
            and all(same_values(*parts) for parts in zip(one, other, strict=True))
        )
    return type(one) is type(other)


def _dicts_apart(what: str, wanted: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    for name in sorted(wanted.keys() | found.keys()):
        one, other = wanted.get(name, "absent"), found.get(name, "absent")
        if one != other:
            yield f"{what} {name}: {other!r}, not {one!r}"


def without_values(bridge: nn.Module) -> list[str]:
    """Paths of tensors without values, promises among them, anywhere that a bridge leads to.

    Attributes, containers, closures and bound methods are followed; classes and modules of Python
    are not.
    """
    found, seen, alive = [], set(), []
    waiting: list[tuple[str, object]] = [("bridge", bridge)]
    while waiting:
        path, thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType, str, bytes, int, float)):
            continue
        seen.add(id(thing))
        alive.append(thing)  # so that no address is used again
        if isinstance(thing, torch.Tensor) and (
            thing.is_meta or any(t.__name__ == "Promise" for t in type(thing).__mro__)
        ):
            found.append(path)
        waiting += [(f"{path}{step}", part) for step, part in _parts(thing)]
    return sorted(found)


def _parts(thing: Any) -> Iterator[tuple[str, object]]:
    if isinstance(thing, dict):
        yield from ((f"[{key!r}]", value) for key, value in list(thing.items()))
    elif isinstance(thing, (list, tuple, set, frozenset)):
        yield from ((f"[{number}]", part) for number, part in enumerate(thing))
    elif isinstance(thing, types.MethodType):
        yield from ((".__self__", thing.__self__), (".__func__", thing.__func__))
    elif isinstance(thing, types.FunctionType):
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            try:
                yield f".<{name}>", cell.cell_contents
            except ValueError:  # not filled yet
                continue
        yield ".__defaults__", thing.__defaults__
        yield ".__kwdefaults__", thing.__kwdefaults__
    elif isinstance(thing, torch.Tensor):
        yield from ((".grad", thing.grad), ("._base", thing._base))
    if hasattr(thing, "__dict__"):
        yield ".__dict__", vars(thing)
    for class_ in type(thing).__mro__:
        for slot in getattr(class_, "__slots__", ()) if not isinstance(thing, torch.Tensor) else ():
            if isinstance(slot, str) and hasattr(thing, slot):
                yield f".{slot}", getattr(thing, slot)
