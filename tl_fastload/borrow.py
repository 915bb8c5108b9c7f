"""Runs a function of another library with some of its module's names replaced, without patching."""

from __future__ import annotations

import builtins
import logging
import warnings
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any


def borrow(function: Callable[..., Any], **replacements: Any) -> Callable[..., Any]:
    """Return a private copy of `function` that sees `replacements` instead of its module's globals.

    function: a plain Python function (not a method, a builtin or a wrapped callable).
    replacements: names of the function's module, and what the copy finds under them.

    Only the copy is affected: functions that it calls still see their own module, so a nested call
    that needs a replacement has to be borrowed and handed in as a replacement itself.

    Raises TypeError for anything that is not a plain Python function.
    """
    if not isinstance(function, FunctionType):
        raise TypeError(f"borrow() needs a plain Python function, not {type(function).__name__}")
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **replacements},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class Silent:
    """A module or a logger whose functions that tell somebody something do nothing."""

    _TELLING = frozenset(
        ("warn", "warn_explicit", "debug", "info", "warning", "error", "exception", "log")
    )

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return _nothing if name in self._TELLING else getattr(self._module, name)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _import(name: str, *args: Any, **kwargs: Any) -> Any:
    module = builtins.__import__(name, *args, **kwargs)
    return Silent(module) if name in ("warnings", "logging") else module


SILENT = {
    "print": _nothing,
    "warnings": Silent(warnings),
    "logging": Silent(logging),
    "__builtins__": {**vars(builtins), "__import__": _import},  # for imports in the function
}
"""Replacements with which a borrowed function neither prints, warns nor logs: filters and levels
would be those of all threads.
"""


def silenced(function: Callable[..., Any]) -> Callable[..., Any]:
    """A private copy of a function or a bound method that says nothing; itself where it is none."""
    if isinstance(function, MethodType) and isinstance(function.__func__, FunctionType):
        return MethodType(borrow(function.__func__, **SILENT), function.__self__)
    return borrow(function, **SILENT) if isinstance(function, FunctionType) else function
