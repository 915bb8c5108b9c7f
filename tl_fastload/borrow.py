"""Runs a function of another library with some of its module's names replaced, without patching."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
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
