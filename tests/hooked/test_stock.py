"""TransformerLens' own functions with our answers behind them: its guards and defaults run."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import loading_from_pretrained as loading

from tests.support import reference
from tl_fastload import ArgumentError, LeanHookedTransformer
from tl_fastload.hooked.answers import stock_name_for
from tl_fastload.hooked.toy import is_toy_name


def load(source: Any, **arguments: Any) -> Any:
    return LeanHookedTransformer.from_pretrained_lean(
        source, **{"device": "cpu", "progress": False, **arguments}
    )


@pytest.mark.parametrize(
    ("official", "label", "expected"),
    [
        ("gpt2", "anything", "gpt2"),
        (None, "/home/me/llama-7b", "checkpoint/llama-7b"),
        (None, "/home/me/gemma/", "checkpoint/gemma"),
        (None, "somebody/pythia-finetune", "checkpoint/pythia-finetune"),
        (None, "mistral", "checkpoint/mistral"),
    ],
)
def test_names_that_mean_nothing(official: Any, label: str, expected: str) -> None:
    assert stock_name_for(official, label) == expected


def test_names_of_toys() -> None:
    assert is_toy_name("NeelNanda/SoLU_1L512W_C4_Code")
    assert is_toy_name("ArthurConmy/redwood_attn_2l")
    assert not is_toy_name("gpt2")
    assert not is_toy_name(None)


@pytest.mark.parametrize(
    "word", ["llama-7b", "gemma-2-2b", "solu-1l", "bert", "t5-small", "santacoder"]
)
def test_the_name_of_a_folder_means_nothing(word: str, zoo: Any, tmp_path: Path) -> None:
    folder = tmp_path / word / f"my-{word}"
    folder.parent.mkdir()
    folder.symlink_to(zoo("gpt2"))
    model, expected = load(folder), load(zoo("gpt2"))
    assert model.cfg.original_architecture == "GPT2LMHeadModel"
    assert model.cfg.model_name == f"my-{word}"
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_working_directory_means_nothing(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerLens looks whether a path of the model's name exists."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / zoo("gpt2").name).symlink_to(zoo("llama"))
    monkeypatch.chdir(tmp_path)
    assert load(zoo("gpt2")).cfg.original_architecture == "GPT2LMHeadModel"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dtype": "float16"},
        {"center_unembed": False},
        {"default_padding_side": "left", "default_prepend_bos": False},
        {"first_n_layers": 1},
        {"n_ctx": 5},
    ],
    ids=str,
)
def test_arguments_mean_what_they_mean_in_stock(arguments: Any, zoo: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        expected = reference.stock_model("llama-gqa", zoo("llama-gqa"), device="cpu", **arguments)
    model = load(zoo("llama-gqa"), **arguments)
    ours, theirs = model.cfg.to_dict(), expected.cfg.to_dict()
    named = ("tokenizer_name", "model_name")
    assert {k: v for k, v in ours.items() if k not in named} == {
        k: v for k, v in theirs.items() if k not in named
    }
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_stocks_own_warnings_are_heard(zoo: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(zoo("llama-gqa"), dtype="float16")
    assert "reduced precision" in caplog.text


def test_the_module_itself_is_as_it_was(zoo: Any) -> None:
    before = dict(vars(loading))
    load(zoo("olmo2"))
    load(zoo("solu"))
    assert dict(vars(loading)) == before


def test_a_subclass_is_built_and_its_own_methods_run(zoo: Any) -> None:
    class Mine(LeanHookedTransformer):
        calls: list[str]

        def load_and_process_state_dict(self, *args: Any, **kwargs: Any) -> None:
            self.calls = ["processed"]
            super().load_and_process_state_dict(*args, **kwargs)

    model = Mine.from_pretrained(zoo("gpt2"), device="cpu", progress=False)
    assert type(model) is Mine
    assert model.calls == ["processed"]
    assert torch.equal(model.W_E, load(zoo("gpt2")).W_E)


def test_weights_that_a_subclass_changes_too_early_are_no_loss(zoo: Any) -> None:
    """They are placed when all of TransformerLens' loading code has run."""

    class Hasty(LeanHookedTransformer):
        def load_and_process_state_dict(self, *args: Any, **kwargs: Any) -> None:
            super().load_and_process_state_dict(*args, **kwargs)
            with torch.no_grad():
                self.embed.W_E.mul_(2)

    with pytest.raises(ArgumentError, match=r"Hasty changes weights.*after from_pretrained"):
        Hasty.from_pretrained(zoo("gpt2"), device="cpu", progress=False)
