"""Regular expressions out of an adapter's configuration, matched in bounded time.

Python's own `re` can take longer than anybody lives for an expression that a stranger wrote, and
cannot be stopped. Here the positions that an expression can reach are computed as sets, each once,
so that the time grows with the square of a name's length and no faster; whether there is a match is
what `re` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from tl_fastload.errors import AdapterError

try:
    from re import _constants, _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as _constants
    import sre_parse as _parser

_MOST_CHARACTERS = 5_000
_KNOWN_FLAGS = int(re.UNICODE | re.IGNORECASE | re.DOTALL | re.VERBOSE)


def matches(pattern: str, name: str, *, whole: bool) -> bool:
    """Whether an expression matches a name from its beginning.

    Args:
        pattern: as for `re`.
        name: a module's.
        whole: to the name's end, as `re.fullmatch`; else as `re.match`.

    Raises:
        AdapterError: it is no expression, or one of a kind that is not followed here.
    """
    if len(name) > _MOST_CHARACTERS:
        raise AdapterError(
            f"{name[:60]}... is the name of a module and {len(name):,} characters long. Check the "
            "adapter's tensors."
        )
    tree, ignores_case = _parsed(pattern)
    text = name.lower() if ignores_case else name
    ends = _Matcher(text, ignores_case).sequence(tree, {0})
    return len(text) in ends if whole else bool(ends)


@cache
def _parsed(pattern: str) -> tuple[Any, bool]:
    def refused(why: str) -> AdapterError:
        return AdapterError(
            f"{pattern[:80]!r} in an adapter's configuration is no regular expression that can be "
            f"followed: {why}. List the modules by name instead, or pass "
            "hf_model=peft_model.merge_and_unload()."
        )

    if len(pattern) > _MOST_CHARACTERS:
        raise refused(f"it has {len(pattern):,} characters")
    try:
        tree = _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise refused(str(error)) from error
    if int(tree.state.flags) & ~_KNOWN_FLAGS:
        raise refused("it sets flags")
    strange = sorted({str(op) for op in _operations(tree)} - _Matcher.FOLLOWED)
    if strange:
        raise refused(f"it uses {', '.join(strange)}")
    return tree, bool(tree.state.flags & re.IGNORECASE)


def _operations(tree: Any) -> Iterable[Any]:
    for operation, argument in tree:
        yield operation
        for part in _parts(argument):
            yield from _operations(part)


def _parts(argument: Any) -> Iterable[Any]:
    if isinstance(argument, _parser.SubPattern):
        yield argument
    elif isinstance(argument, (tuple, list)):
        for one in argument:
            yield from _parts(one)


class _Matcher:
    """Where parts of an expression can end in one text.

    Args:
        text: in lower case if case is to be ignored.
        ignores_case: whether it is.
    """

    FOLLOWED = frozenset(
        ("LITERAL NOT_LITERAL ANY IN BRANCH SUBPATTERN MAX_REPEAT MIN_REPEAT AT ASSERT").split()
    ) | {"ASSERT_NOT"}

    def __init__(self, text: str, ignores_case: bool) -> None:
        self._text = text
        self._fold = str.lower if ignores_case else str
        self._known: dict[tuple[int, int], set[int]] = {}

    def sequence(self, parts: Any, starts: set[int]) -> set[int]:
        """Where a sequence of parts can end that begins at one of some positions."""
        for operation, argument in parts:
            starts = {end for at in starts for end in self._ends(operation, argument, at)}
        return starts

    def _ends(self, operation: Any, argument: Any, at: int) -> set[int]:
        if operation in (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN):
            is_one = at < len(self._text) and self._takes(operation, argument, self._text[at])
            return {at + 1} if is_one else set()
        if operation is _constants.AT:
            return {at} if self._is_at(argument, at) else set()
        key = (id(argument), at)  # the tree lives as long as the program: it is cached
        if key not in self._known:
            self._known[key] = self._compound(operation, argument, at)
        return self._known[key]

    def _compound(self, operation: Any, argument: Any, at: int) -> set[int]:
        if operation is _constants.BRANCH:
            return {end for branch in argument[1] for end in self.sequence(branch, {at})}
        if operation is _constants.SUBPATTERN:
            return self.sequence(argument[-1], {at})
        if operation in (_constants.ASSERT, _constants.ASSERT_NOT):
            direction, inner = argument
            if direction > 0:
                is_there = bool(self.sequence(inner, {at}))
            else:
                is_there = any(at in self.sequence(inner, {start}) for start in range(at + 1))
            return {at} if is_there is (operation is _constants.ASSERT) else set()
        least, most, inner = argument
        return self._repeated(int(least), int(most), inner, at)

    def _repeated(self, least: int, most: int, inner: Any, at: int) -> set[int]:
        now = {at}
        for _ in range(min(least, len(self._text) + 1)):
            now = self.sequence(inner, now)
        found = set(now)
        for _ in range(most - min(least, most)):
            now = self.sequence(inner, now) - found
            if not now:
                break
            found |= now
        return found

    def _takes(self, operation: Any, argument: Any, character: str) -> bool:
        if operation is _constants.ANY:
            return character != "\n"
        if operation is not _constants.IN:
            is_it = self._fold(chr(argument)) == character
            return is_it is (operation is _constants.LITERAL)
        is_negated = bool(argument) and argument[0][0] is _constants.NEGATE
        members = argument[1:] if is_negated else argument
        is_member = any(self._is_in(kind, value, character) for kind, value in members)
        return is_member is not is_negated

    def _is_in(self, kind: Any, value: Any, character: str) -> bool:
        spellings = {character, character.upper()} if self._fold is str.lower else {character}
        if kind is _constants.LITERAL:
            return chr(value) in spellings
        if kind is _constants.RANGE:
            return any(value[0] <= ord(one) <= value[1] for one in spellings if len(one) == 1)
        name = str(value).removeprefix("CATEGORY_")
        is_it = {
            "DIGIT": character.isdecimal(),
            "SPACE": character.isspace(),
            "WORD": character.isalnum() or character == "_",
        }[name.removeprefix("NOT_")]
        return is_it is not name.startswith("NOT_")

    def _is_at(self, place: Any, at: int) -> bool:
        text = self._text
        if place in (_constants.AT_BEGINNING, _constants.AT_BEGINNING_STRING):
            return at == 0
        if place is _constants.AT_END:
            return at == len(text) or text[at:] == "\n"
        if place is _constants.AT_END_STRING:
            return at == len(text)
        around = (text[at - 1 : at] if at else "", text[at : at + 1])
        before, after = (one.isalnum() or one == "_" for one in around)
        return (before != after) is (place is _constants.AT_BOUNDARY)
