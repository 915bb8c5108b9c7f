"""Classes with loading methods of their own beside the mixin: both orders."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM

from tests.support.comparison import changed, lean_model, values
from tl_fastload import LeanHookedTransformer, LeanLoadingMixin
from tl_fastload.errors import ArgumentError


class Replacement(HookedTransformer):
    """As circuit-tracer's: loads the model, then puts transcoders into it."""

    transcoders: Any = None

    @classmethod
    def from_pretrained_and_transcoders(cls, name: Any, transcoders: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(
            name, fold_ln=False, center_writing_weights=False, center_unembed=False, **kwargs
        )
        model.transcoders = transcoders
        return model

    @classmethod
    def from_pretrained(cls, name: Any, transcoder_set: str, **kwargs: Any) -> Any:
        return cls.from_pretrained_and_transcoders(name, [transcoder_set], **kwargs)


class Saes(HookedTransformer):
    """As SAELens': methods and state of its own, no loading."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.saes: list[Any] = []


@pytest.fixture(autouse=True)
def no_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*_: Any, **__: Any) -> None:
        raise AssertionError("stock's loader ran")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)


def test_their_loading_method_first_runs_and_is_lean(zoo: Any) -> None:
    class Mine(Replacement, LeanHookedTransformer):
        pass

    flags = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}
    expected = values(lean_model(zoo("gpt2"), **flags))
    model = Mine.from_pretrained(zoo("gpt2"), "set", device="cpu")
    assert type(model) is Mine
    assert model.transcoders == ["set"]
    assert model.load_report.mapped_bytes > 0
    assert changed(expected, model) == []
    both = Mine.from_pretrained_and_transcoders(zoo("gpt2"), "others", device="cpu")
    assert both.transcoders == "others"
    assert both.load_report.mapped_bytes > 0


def test_no_processing_goes_through_their_loading_method(zoo: Any) -> None:
    class Marked(HookedTransformer):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            model = super().from_pretrained(*args, **kwargs)
            model.mark = kwargs["fold_ln"]
            return model

    class Mine(Marked, LeanHookedTransformer):
        pass

    assert Mine.from_pretrained_no_processing(zoo("gpt2"), device="cpu").mark is False


def test_the_mixin_first_is_refused_where_it_would_hide_them() -> None:
    with pytest.raises(ArgumentError, match=r"Replacement\.from_pretrained would never") as caught:
        type("Mine", (LeanLoadingMixin, Replacement), {})
    assert "from_pretrained_and_transcoders would run HookedTransformer's" in str(caught.value)
    assert "class Mine(Replacement, LeanHookedTransformer)" in str(caught.value)

    class Own(HookedTransformer):
        def process_weights_(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError

    class ByName(HookedTransformer):
        @staticmethod
        def load(name: str) -> Any:
            return (lambda: HookedTransformer.from_pretrained(name))()

    for base, words in (
        (Own, r"process_weights_ would never"),
        (ByName, r"ByName\.load would run"),
    ):
        with pytest.raises(ArgumentError, match=words):
            type("Mine", (LeanLoadingMixin, base), {})


def test_what_the_class_defines_itself_is_its_decision(zoo: Any) -> None:
    class Mine(LeanLoadingMixin, Replacement):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return cls.from_pretrained_lean(*args, **kwargs)

        @classmethod
        def from_pretrained_and_transcoders(cls, name: Any, transcoders: Any) -> Any:
            model = cls.from_pretrained_lean(name, device="cpu")
            model.transcoders = transcoders
            return model

    class Derived(Mine):
        pass

    assert Derived.from_pretrained(zoo("gpt2"), device="cpu").transcoders is None
    assert Derived.from_pretrained_and_transcoders(zoo("gpt2"), 1).transcoders == 1


def test_stocks_class_before_the_mixin_is_refused() -> None:
    for bases in ((HookedTransformer, LeanLoadingMixin), (Replacement, LeanLoadingMixin)):
        with pytest.raises(ArgumentError, match=r"every load would be stock's.*LeanHooked"):
            type("Mine", bases, {})


def test_a_loading_method_that_never_calls_the_lean_one_is_told() -> None:
    class Elsewhere(HookedTransformer):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return cls(*args)

    with pytest.warns(UserWarning, match=r"Elsewhere\.from_pretrained comes before"):
        type("Mine", (Elsewhere, LeanHookedTransformer), {})


def test_a_base_without_loading_methods_goes_in_either_order() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bases in ((LeanLoadingMixin, Saes), (Saes, LeanHookedTransformer)):
            made = type("Mine", bases, {})
            assert made.from_pretrained.__func__ is LeanLoadingMixin.from_pretrained.__func__
