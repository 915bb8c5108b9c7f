"""Whether the loading methods of a class's bases and those of the mixin reach each other."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import CodeType
from typing import Any

from transformer_lens import HookedTransformer

from tl_fastload.errors import ArgumentError
from tl_fastload.ground.borrow import innermost

_LOADS = ("from_pretrained", "from_pretrained_no_processing")
# Methods of the mixin that do not call those of the classes behind it.
_OWN = (
    *_LOADS,
    *(f"{name}_lean" for name in _LOADS),
    *("process_weights_", "fill_missing_keys", "save_lean"),
)


def check_bases(cls: type, mixin: type) -> None:
    """Raise for a class of which some loading method would run stock's loader, or not at all.

    Methods that the class defines itself are its author's decision.

    Args:
        cls: the class that is being made.
        mixin: `tl_fastload.LeanLoadingMixin`.

    Raises:
        ArgumentError: a base behind the mixin has a loading method of its own, which the mixin's
            hides or which calls the ones behind it, or HookedTransformer comes before the mixin.
    """
    at = cls.__mro__.index(mixin)
    before, behind = cls.__mro__[:at], cls.__mro__[at + 1 :]
    if HookedTransformer in before:
        bases = [base.__name__ for base in cls.__bases__ if base is not mixin]
        raise ArgumentError(
            f"class {cls.__name__}: HookedTransformer's own loading methods come before those of "
            f"{mixin.__name__}, so that every load would be stock's. Write class {cls.__name__}"
            f"({', '.join([*bases, 'LeanHookedTransformer'])})."
        )
    settled = {name for one in before for name in vars(one)}
    for base in behind:
        # Those of the class that the mixin is made for, and the mixin's own, go together.
        if not (issubclass(HookedTransformer, base) or issubclass(mixin, base)):
            found = [text for name, text in _hidden(base, mixin) if name not in settled]
            if found:
                raise ArgumentError(_message(cls, base, found))
    for base in before:
        for name in () if issubclass(base, mixin) else _LOADS:
            names = _names(vars(base).get(name))
            if name in vars(base) and not any(one.startswith("from_pretrained") for one in names):
                warnings.warn(
                    f"{base.__name__}.{name} comes before {mixin.__name__}.{name} and never calls "
                    f"it: what it does is not a lean load of {cls.__name__}.",
                    stacklevel=4,
                )


def _hidden(base: type, mixin: type) -> Iterator[tuple[str, str]]:
    """The methods of a class behind the mixin that never run, or run stock's loader."""
    for name, member in vars(base).items():
        names = _names(member)
        if name in _OWN:
            yield name, f"{base.__name__}.{name} would never run, {mixin.__name__}'s comes first"
        elif names & {"super", HookedTransformer.__name__} and names & set(_LOADS):
            yield (
                name,
                f"{base.__name__}.{name} would run HookedTransformer's own loader, which takes "
                "several copies of the weights",
            )


def _names(member: Any) -> set[str]:
    """The globals and attributes that a method uses, those of functions inside it included."""
    function = innermost(member)
    found: set[str] = set()
    pending: list[Any] = [] if function is None else [function.__code__]
    while pending:
        code = pending.pop()
        found.update(code.co_names)
        pending.extend(one for one in code.co_consts if isinstance(one, CodeType))
    return found


def _message(cls: type, base: type, found: list[str]) -> str:
    return (
        f"class {cls.__name__}: {'; '.join(found)}. Let {base.__name__} come first and a lean "
        f"class last, class {cls.__name__}({base.__name__}, LeanHookedTransformer): its methods "
        f"then run and what they call is lean. Or define these methods in {cls.__name__} itself, "
        "through cls.from_pretrained_lean."
    )
