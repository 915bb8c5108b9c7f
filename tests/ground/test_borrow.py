"""Private copies of functions with other globals."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock, create_autospec

import pytest

from tl_fastload.errors import LeanLoadError, ReplacedFunctionError
from tl_fastload.ground.borrow import asked_for, borrow, innermost, spelled_out

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


class _Traced:
    """What a tracer puts in place of a function."""

    def __init__(self, function: Any) -> None:
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the wrapper ran")


def _wrapped(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the wrapper ran")

    return wrapper


def test_wrappers_are_taken_off_down_to_the_function() -> None:
    class Holder:
        method = _sentence

    wrappers = (
        _wrapped(_sentence),
        _wrapped(_Traced(_wrapped(_sentence))),
        classmethod(_wrapped(_sentence)),
        _wrapped(classmethod(_wrapped(_sentence))),
        staticmethod(_sentence),
        _wrapped(Holder().method),
    )
    for wrapper in wrappers:
        assert innermost(wrapper) is _sentence
        assert borrow(wrapper, needs=["_WORD"], _WORD="replaced")("text") == "replaced text!"
    bound = functools.partial(_wrapped(_sentence), "bound", mark="?")
    assert borrow(bound, needs=["_WORD"], _WORD="replaced")() == "replaced bound?"


def test_what_is_not_a_plain_function_is_refused() -> None:
    own = SimpleNamespace()
    own.__wrapped__ = own  # wraps itself
    for other in (len, Mock(), MagicMock(), Mock(wraps=_sentence), _sentence("text"), int, own):
        assert innermost(other) is None
        with pytest.raises(ReplacedFunctionError, match=r"In place of the.function.*plain"):
            borrow(other, label="the.function")
    with pytest.raises(LeanLoadError, match=f"builtin_function_or_method|{len.__qualname__}"):
        borrow(len)


def test_a_function_that_would_not_see_its_replacements_is_refused() -> None:
    def unrelated(*args: Any) -> str:
        return _sentence(*args)

    for other in (unrelated, create_autospec(_sentence), functools.partial(unrelated)):
        with pytest.raises(ReplacedFunctionError, match=r"test_borrow|mock|string") as caught:
            borrow(other, label="the.function", needs=["_WORD"], _WORD="replaced")
        assert "_WORD" in str(caught.value)
        assert "the.function" in str(caught.value)
    assert borrow(unrelated, _WORD="replaced")("text") == "original text!"  # nobody needs it


def test_names_are_also_found_in_functions_inside() -> None:
    def outer(value: str) -> Any:
        return lambda: (_WORD, value in ("one", "two"))

    assert "_WORD" in asked_for(outer.__code__)
    assert {"one", "two"} <= spelled_out(outer.__code__)
