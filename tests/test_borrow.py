"""Private copies of functions with other globals."""

from __future__ import annotations

import pytest

from tl_fastload.borrow import borrow

_WORD = "original"


def _sentence(name: str, *, mark: str = "!") -> str:
    return f"{_WORD} {name}{mark}"


def test_only_the_copy_sees_the_replacement() -> None:
    copy = borrow(_sentence, _WORD="replaced")
    assert copy("text") == "replaced text!"
    assert _sentence("text") == "original text!"


def test_defaults_and_keyword_only_defaults_are_kept() -> None:
    assert borrow(_sentence)("text", mark="?") == "original text?"
    assert borrow(_sentence).__kwdefaults__ == {"mark": "!"}


def test_closures_are_kept() -> None:
    secret = object()

    def inner() -> tuple[object, str]:
        return secret, _WORD

    assert borrow(inner, _WORD="replaced")() == (secret, "replaced")


def test_what_is_not_a_plain_function_is_refused() -> None:
    with pytest.raises(TypeError, match="builtin_function_or_method"):
        borrow(len)
