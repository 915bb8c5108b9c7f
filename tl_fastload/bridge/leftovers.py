"""Looks through a bridge for recorded tensors that were not replaced by values."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

from tl_fastload.errors import InternalError
from tl_fastload.ground.words import listed
from tl_fastload.recipes.promise import Promise

_PLAIN = frozenset((str, bytes, int, float, complex, bool, type(None), type, ModuleType))
_CONTAINERS = frozenset((dict, OrderedDict, list, tuple, set, frozenset))
_OWNERS = ("transformer_lens", "transformers", "tl_fastload", "torch.nn")
_EMPTY = type((lambda x: lambda: x)(0).__closure__[0])()  # type: ignore[index]


def require_none_left(bridge: Any) -> None:
    """Raise InternalError if a promise is reachable from a bridge.

    Looks into parameters, buffers, every attribute of modules and of the libraries' own objects,
    containers, and what functions hold.
    """
    left = [_written(path) for path, value in _reachable(bridge) if isinstance(value, Promise)]
    if left:
        raise InternalError(
            f"{listed(left, 5)} of the bridge never got values. This is a fault of tl_fastload: "
            "please report it with the model's name. TransformerBridge.boot_transformers loads the "
            "model meanwhile."
        )


def _written(path: Any) -> str:
    if path is None:
        return "bridge"
    before, form, key = path
    return f"{_written(before)}{form.format(key)}"


def _reachable(root: Any) -> Iterator[tuple[Any, Any]]:
    seen = {id(root)}
    todo: list[tuple[Any, Any]] = [(None, root)]
    while todo:
        path, value = todo.pop()
        yield path, value
        if isinstance(value, Promise):
            continue
        for form, key, child in _parts(value):
            # Most of what modules hold: numbers and empty dictionaries.
            is_leaf = type(child) in _PLAIN or (type(child) in _CONTAINERS and not child)
            if not is_leaf and id(child) not in seen:
                seen.add(id(child))
                todo.append(((path, form, key), child))


def _parts(value: Any) -> Iterator[tuple[str, Any, Any]]:
    """What a value holds: how that is written, by which key, and itself."""
    if isinstance(value, dict):
        yield from (("[{!r}]", key, child) for key, child in list(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from (("[{}]", number, child) for number, child in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from (("()", None, part) for part in (value.func, value.args, value.keywords))
    elif isinstance(value, MethodType):
        yield from (("()", None, part) for part in (value.__self__, value.__func__))
    elif isinstance(value, FunctionType):
        cells = (cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY)
        yield from (("()", None, x) for x in (*cells, value.__defaults__, value.__kwdefaults__))
    kind: Any = type(value)
    if _is_ours(kind):
        attributes = getattr(value, "__dict__", {})
        yield from ((".{}", name, child) for name, child in list(attributes.items()))


@functools.cache
def _is_ours(kind: Any) -> bool:
    """Whether the attributes of objects are looked at: of anybody's modules, and of what belongs to
    the libraries whose code has run.
    """
    if issubclass(kind, type):
        return False
    is_theirs: bool = kind.__module__.startswith(_OWNERS)
    return is_theirs or issubclass(kind, (torch.nn.Module, torch.Tensor))
