"""Runs a function of another library with some of its module's names replaced, without patching."""

from __future__ import annotations

import builtins
import logging
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from tl_fastload.errors import ReplacedFunctionError


def borrow(
    function: Any, *, label: str = "", needs: Iterable[str] = (), **replacements: Any
) -> Callable[..., Any]:
    """Return a private copy of `function` that sees `replacements` instead of its module's globals.

    function: a plain Python function; or what wraps one and says so (`functools.wraps`, a class or
        static method, a bound method, a `functools.partial`), which is unwrapped down to it. The
        copy of a method takes its first argument like any other; a partial's arguments stay bound.
    label: what messages call the place where the function was found.
    needs: those of `replacements` that are of no use unless the function really asks for them.
    replacements: names of the function's module, and what the copy finds under them.

    Only the copy is affected: functions that it calls still see their own module, so a nested call
    that needs a replacement has to be borrowed and handed in as a replacement itself.

    Raises ReplacedFunctionError for anything that is, or wraps, no plain Python function (a mock,
    a builtin), and for a function that does not ask for a name in `needs`: the copy of it would
    run something else than was meant.
    """
    if isinstance(function, partial):
        inner = borrow(function.func, label=label, needs=needs, **replacements)
        return partial(inner, *function.args, **function.keywords)
    plain = innermost(function)
    if plain is None:
        raise ReplacedFunctionError(_message(label, function, "is no plain Python function"))
    needed = set(needs)
    unseen = sorted(needed - asked_for(plain.__code__)) if needed else []
    if unseen:
        raise ReplacedFunctionError(
            _message(label, plain, f"does not use {', '.join(unseen)}, as the original does")
        )
    copy = FunctionType(
        plain.__code__,
        {**plain.__globals__, **replacements},
        plain.__name__,
        plain.__defaults__,
        plain.__closure__,
    )
    copy.__kwdefaults__ = plain.__kwdefaults__
    return copy


def innermost(function: Any) -> FunctionType | None:
    """The plain function that others wrap; None if there is none."""
    seen: list[Any] = []
    # A proxy's `__class__` may claim anything: its type does not.
    while type(function) is not FunctionType or "__wrapped__" in vars(function):
        if any(function is one for one in seen):
            return None  # it wraps itself
        seen.append(function)
        if isinstance(function, partial):
            function = function.func
        elif isinstance(function, (classmethod, staticmethod, MethodType)):
            function = function.__func__
        elif getattr(function, "__wrapped__", None) is not None:
            function = function.__wrapped__
        else:
            return None
    found: FunctionType = function
    return found


@lru_cache(maxsize=64)
def asked_for(code: CodeType) -> frozenset[str]:
    """The names that a function looks up, functions defined inside it included: those of its
    module, and of attributes, which only its instructions, slow to take apart, would tell apart.
    """
    inner = (one for one in code.co_consts if isinstance(one, CodeType))
    return frozenset(code.co_names).union(*map(asked_for, inner))


@lru_cache(maxsize=64)
def spelled_out(code: CodeType | tuple[Any, ...] | frozenset[Any]) -> frozenset[str]:
    """The strings that a function holds, also in tuples and in functions defined inside it."""
    parts = code.co_consts if isinstance(code, CodeType) else code
    inner = (one for one in parts if isinstance(one, (CodeType, tuple, frozenset)))
    return frozenset(one for one in parts if isinstance(one, str)).union(*map(spelled_out, inner))


def _message(label: str, function: Any, what: str) -> str:
    code = getattr(function, "__code__", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if isinstance(code, CodeType) else ""
    name = getattr(function, "__qualname__", None)
    shown = name if isinstance(name, str) else f"an object of type {type(function).__name__}"
    return (
        f"In place of {label or 'a function'} stands {shown}{place}, which {what}. A lean load "
        "runs the original with other answers, and would run something else here. Put the original "
        "back, or let what stands there say what it wraps (functools.wraps)."
    )


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


SILENT: dict[str, Any] = {
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
