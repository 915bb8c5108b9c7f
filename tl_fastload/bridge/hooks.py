"""TransformerLens' search for the hooks of a bridge, without what it does not need."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tl_fastload.ground.borrow import borrow

_FUNCTIONS = (FunctionType, staticmethod, classmethod)


def look_for_hooks(scan: Callable[..., None], module: Any, prefix: str) -> None:
    """Run TransformerLens' search, which takes every attribute of every module to see what it is:
    attributes that it computes (`W_E_pos` is a copy of the embeddings) have no values, and the
    functions of a class, most of what a module has and no hooks, are not taken.

    Args:
        scan: TransformerLens' own, bound.
        module: what to search.
        prefix: the name of that.
    """
    if isinstance(scan, MethodType) and isinstance(scan.__func__, FunctionType):
        scan = MethodType(borrow(scan.__func__, dir=_Names().of), scan.__self__)
    with _WithoutValues():  # type: ignore[no-untyped-call]
        scan(module, prefix)


class _WithoutValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs or {}))


def _on_meta(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class _Names:
    """Stands where `dir` is asked for the attributes of a module."""

    def __init__(self) -> None:
        self._of_classes: dict[Any, set[str]] = {}

    def of(self, module: Any) -> list[str]:
        """As `dir`, without the functions of its class."""
        cls: Any = type(module)
        if cls.__dir__ is not nn.Module.__dir__:
            return dir(module)
        if cls not in self._of_classes:
            found = {
                name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()
            }
            names = {name for name, value in found.items() if not isinstance(value, _FUNCTIONS)}
            self._of_classes[cls] = names
        own = (*vars(module), *module._parameters, *module._modules, *module._buffers)
        names = self._of_classes[cls].union(own)
        return sorted(name for name in names if not name[0].isdigit())
