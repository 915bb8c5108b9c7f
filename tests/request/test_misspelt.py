"""A misspelt argument is told the nearest one, under the name of the function that was called."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import tl_fastload
from tl_fastload import ArgumentError, LeanHookedTransformer, LeanTransformerBridge
from tl_fastload.embedded_model import embedded_model_path

FUNCTIONS = (
    *(LeanHookedTransformer.from_pretrained_lean, LeanHookedTransformer.from_pretrained),
    *(LeanHookedTransformer.from_pretrained_no_processing_lean, LeanHookedTransformer.plan),
    LeanHookedTransformer.from_pretrained_no_processing,
    *(LeanTransformerBridge.from_pretrained_lean, LeanTransformerBridge.boot_transformers_lean),
)
MEANT = {
    "adaptor": "adapter",
    "chache": "cache",
    "check_mem": "check_memory",
    "chekpoint_index": "checkpoint_index",
    "quantise": "quantize",
    "revison": "revision",
    "torch_dtyp": "torch_dtype",
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f"{f.__self__.__name__}.{f.__name__}")
def test_the_nearest_argument(function: Any, no_reading: None) -> None:
    own = inspect.signature(function).parameters
    for name, meant in MEANT.items():
        with pytest.raises(ArgumentError) as caught:
            function(embedded_model_path(), **{name: "x"})
        said = str(caught.value)
        assert said.startswith(f"{name}= is neither an argument of {function.__name__} nor a field")
        is_taken = meant in own or "device" not in own or meant in ("revision", "torch_dtype")
        where = "" if is_taken else ", which from_pretrained_lean takes"
        assert said.endswith(f" Did you mean {meant}={where}?"), said


def test_what_another_function_takes(no_reading: None) -> None:
    with pytest.raises(ArgumentError, match=r" from_pretrained_lean takes it\.$"):
        LeanTransformerBridge.boot_transformers_lean(embedded_model_path(), quantize="nf4")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (tl_fastload.save_lean, "save_lean() got an unexpected keyword argument 'progres'."),
        (LeanHookedTransformer.save_lean, "save_lean() got an unexpected keyword"),
        (LeanHookedTransformer.process_weights_, "process_weights_() got an unexpected"),
        (tl_fastload.load_weights_, "load_weights_() got an unexpected keyword argument"),
        (tl_fastload.push_copy, "push_copy() got an unexpected keyword argument 'privat'."),
        (tl_fastload.cache.prune, "prune() got an unexpected keyword argument 'max_byte'."),
        (tl_fastload.LoadReport.plot, "plot() got an unexpected keyword argument 'pth'."),
        (tl_fastload.LoadPlan.plot, "plot() got an unexpected keyword argument 'pth'."),
    ],
)
def test_functions_whose_arguments_are_all_their_own(function: Any, said: str) -> None:
    slips = {"progress": "progres", "fold_ln": "fold_nl", "strict": "strickt", "private": "privat"}
    slips |= {"max_bytes": "max_byte", "path": "pth"}
    own = inspect.signature(function).parameters
    meant = next(name for name in slips if name in own)
    given = {name: None for name, one in own.items() if one.default is one.empty}
    with pytest.raises(TypeError) as caught:
        function(**given, **{slips[meant]: None})
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith(f" Did you mean {meant}=?")


def test_a_call_without_a_model() -> None:
    said = r"^from_pretrained_lean\(\) missing a required argument: 'model_name'\.$"
    with pytest.raises(TypeError, match=said):
        LeanHookedTransformer.from_pretrained_lean()  # type: ignore[call-arg]


def test_the_nearest_field_where_no_argument_is_near(no_reading: None) -> None:
    with pytest.raises(ArgumentError, match=r"Did you mean the field n_embd=\?"):
        tl_fastload.plan(embedded_model_path(), n_embed=1)
    with pytest.raises(ArgumentError, match=r"configuration\.$"):
        tl_fastload.plan(embedded_model_path(), frobnicate=1)


def test_of_a_copy(tmp_path: Path) -> None:
    LeanHookedTransformer.from_pretrained_lean(embedded_model_path()).save_lean(tmp_path / "copy")
    with pytest.raises(ArgumentError, match=r"quantise=.* Did you mean quantize=\?"):
        LeanHookedTransformer.from_pretrained_lean(tmp_path / "copy", quantise="nf4")


def test_editors_know_what_is_returned() -> None:
    for function in FUNCTIONS:
        returned = inspect.signature(function).return_annotation
        assert returned == ("LoadPlan" if function.__name__ == "plan" else "Self")
