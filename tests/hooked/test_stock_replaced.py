"""Loads while other code stands in place of TransformerLens' functions: lean or refused."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from transformer_lens import HookedTransformer
from transformer_lens import loading_from_pretrained as loading
from transformers import AutoModelForCausalLM

from tests.support.comparison import changed, lean_model, values
from tl_fastload import plan
from tl_fastload.errors import ReplacedFunctionError
from tl_fastload.hooked import architectures
from tl_fastload.hooked.stock import run_from_pretrained

FUNCTIONS = (
    "convert_hf_model_config",
    "get_pretrained_model_config",
    "get_pretrained_state_dict",
)


@pytest.fixture(autouse=True)
def no_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*_: Any, **__: Any) -> None:
        raise AssertionError("stock's loader ran")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def test_functions_that_are_wrapped(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = zoo("gpt2")
    expected = values(lean_model(folder))
    original = HookedTransformer.__dict__["from_pretrained"]
    for wrapper in (
        classmethod(traced(original.__func__)),
        staticmethod(traced(HookedTransformer.from_pretrained)),
        traced(original),
        functools.partial(traced(original.__func__), HookedTransformer),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(HookedTransformer, "from_pretrained", wrapper)
            for name in FUNCTIONS:
                patch.setattr(loading, name, traced(getattr(loading, name)))
            assert architectures.converted() == architectures.SUPPORTED_ARCHITECTURES
            assert changed(expected, lean_model(folder)) == []


@pytest.mark.parametrize("make", [Mock, lambda: lambda *a, **k: None], ids=["mock", "function"])
def test_functions_that_are_replaced(
    make: Any, zoo: Any, no_reading: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = zoo("gpt2")
    for name in FUNCTIONS:
        with monkeypatch.context() as patch:
            patch.setattr(loading, name, make())
            for load in (lean_model, plan):
                with pytest.raises(ReplacedFunctionError, match=name):
                    load(folder)
            assert len(architectures.converted()) > 5
    monkeypatch.setattr(HookedTransformer, "from_pretrained", make())
    with pytest.raises(ReplacedFunctionError, match=r"HookedTransformer\.from_pretrained"):
        lean_model(folder)


def test_a_replacement_with_the_right_names_that_asks_for_no_weights() -> None:
    """Nothing tells it from the original before it has run."""
    found = object()

    def imposter(cls: Any, name: str, **_: Any) -> Any:
        return found if loading is not None else None

    original = HookedTransformer.__dict__["from_pretrained"]
    HookedTransformer.from_pretrained = classmethod(imposter)
    try:
        with pytest.raises(ReplacedFunctionError, match="without asking for its weights"):
            run_from_pretrained(Mock(), Mock(), "gpt2")
    finally:
        HookedTransformer.from_pretrained = original


TYPE_CHECKED = """
import sys
import jaxtyping
jaxtyping.install_import_hook("transformer_lens", "beartype.beartype")
from transformer_lens import HookedTransformer
from tl_fastload import LeanHookedTransformer
assert hasattr(HookedTransformer.from_pretrained, "__wrapped__")  # the hook did something
for folder in sys.argv[1:]:
    model = LeanHookedTransformer.from_pretrained_no_processing(folder, device="cpu")
    assert model.load_report.mapped_bytes > 0
    model.process_weights_()
    LeanHookedTransformer.from_pretrained(folder, device="cpu")
"""


def test_under_transformer_lens_own_test_setting(zoo: Any, tmp_path: Path) -> None:
    """Every function checks the types of its arguments by jaxtyping and beartype."""
    folders = [str(zoo(case_id)) for case_id in ("gpt2", "llama-gqa")]
    command = [sys.executable, "-c", TYPE_CHECKED, *folders]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
