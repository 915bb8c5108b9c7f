"""Looks through a bridge for recorded tensors that were not replaced by values."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

from tl_fastload.errors import InternalError
from tl_fastload.ground.words import listed
from tl_fastload.recipes.promise import Promise

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, torch.dtype)
_OWNERS = ("transformer_lens", "transformers", "tl_fastload", "torch.nn")


def require_none_left(bridge: Any) -> None:
    """Raise InternalError if a promise is reachable from a bridge.

    Looks into parameters, buffers, every attribute of modules and of the libraries' own objects,
    containers, and what functions hold.
    """
    left = [path for path, value in _reachable(bridge) if isinstance(value, Promise)]
    if left:
        raise InternalError(
            f"{listed(left, 5)} of the bridge never got values. This is a fault of tl_fastload: "
            "please report it with the model's name. TransformerBridge.boot_transformers loads the "
            "model meanwhile."
        )


def _reachable(root: Any) -> Iterator[tuple[str, Any]]:
    seen = {id(root)}
    todo: list[tuple[str, Any]] = [("bridge", root)]
    while todo:
        path, value = todo.pop()
        yield path, value
        if isinstance(value, Promise):
            continue
        for name, child in _parts(value):
            if not isinstance(child, _PLAIN) and id(child) not in seen:
                seen.add(id(child))
                todo.append((path + name, child))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", child) for key, child in list(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{number}]", child) for number, child in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from (("()", value.func), ("()", value.args), ("()", value.keywords))
    elif isinstance(value, MethodType):
        yield from (("()", value.__self__), ("()", value.__func__))
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            if cell != _EMPTY:
                yield "()", cell.cell_contents
        yield from (("()", value.__defaults__), ("()", value.__kwdefaults__))
    if _is_ours(value):
        yield from ((f".{name}", child) for name, child in list(vars(value).items()))


def _is_ours(value: Any) -> bool:
    """Whether the attributes of an object are looked at: modules of anybody, and what belongs to
    the libraries whose code has run.
    """
    if not hasattr(value, "__dict__") or isinstance(value, type):
        return False
    return isinstance(value, (torch.nn.Module, torch.Tensor)) or type(value).__module__.startswith(
        _OWNERS
    )


_EMPTY = type((lambda x: lambda: x)(0).__closure__[0])()  # type: ignore[index]
