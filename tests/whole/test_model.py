"""The public classes: their methods, the arguments of a load, strategies, mapping."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformer_lens import HookedTransformer
from transformers import AutoTokenizer

from tests.support import reference
from tests.support.comparison import (
    NAMES,
    changed,
    differences,
    lean_model,
    run,
    stock_model,
    values,
)
from tests.support.reference import STOCK_SKIPS
from tests.support.zoo import CASES, tokens
from tl_fastload import LeanHookedTransformer, LeanLoadingMixin, LoadReport
from tl_fastload.errors import ArgumentError, StrategyError, UnsupportedArchitectureError
from tl_fastload.ground import compat
from tl_fastload.ground.geometry import is_dense

RAW = reference.NO_PROCESSING
SEVERAL = ("gpt2", "neox", "llama-gqa1-tied", "gemma3-vision", "mixtral", "phi3-gqa", "qwen")


class TheirModel(HookedTransformer):
    """A library's own subclass: another attribute, another method, its own setup."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.theirs = {"saes": 0}

    def count_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


class Mine(LeanLoadingMixin, TheirModel):
    """The one line that makes it lean."""


@pytest.mark.parametrize("processed", [True, False], ids=["processed", "unprocessed"])
@pytest.mark.parametrize("lean_name", [True, False], ids=["lean", "stock-name"])
def test_their_subclass_becomes_lean(processed: bool, lean_name: bool, zoo: Any) -> None:
    name = "from_pretrained" if processed else "from_pretrained_no_processing"
    method = getattr(Mine, name + "_lean" if lean_name else name)
    model = method(zoo("gpt2"), device="cpu")
    assert type(model) is Mine
    assert isinstance(model, TheirModel)
    assert model.theirs == {"saes": 0}
    assert isinstance(model.load_report, LoadReport)
    stock = stock_model("gpt2", zoo("gpt2"), **({} if processed else RAW))
    apart = differences(stock, model)
    assert apart == []
    assert model.count_parameters() == sum(p.numel() for p in stock.parameters())


def test_a_subclass_that_was_made_without_weights_can_load_them(zoo: Any) -> None:
    stock = stock_model("gpt2", zoo("gpt2"), **RAW)
    weights = values(stock)
    model = Mine(copy.deepcopy(stock.cfg))  # processing changes a configuration
    stock.load_and_process_state_dict(values(stock))
    model.load_and_process_state_dict(weights)
    apart = differences(stock, model)
    assert apart == []
    assert model.load_report.strategy == "copy"


@pytest.mark.parametrize("case_id", SEVERAL)
def test_no_processing_lean(case_id: str, zoo: Any) -> None:
    folder = zoo(case_id)
    lean = LeanHookedTransformer.from_pretrained_no_processing_lean(
        folder, device="cpu", progress=False
    )
    apart = differences(stock_model(case_id, folder, **RAW), lean)
    assert apart == []
    assert set(lean.load_report.processing.values()) == {"skipped: not asked for"}


def test_no_processing_lean_takes_single_steps(zoo: Any) -> None:
    folder = zoo("gpt2")
    lean = LeanHookedTransformer.from_pretrained_no_processing_lean(
        folder, center_unembed=True, device="cpu", dtype=torch.bfloat16
    )
    flags = {**RAW, "center_unembed": True}
    stock = stock_model("gpt2", folder, **flags, dtype=torch.bfloat16)
    apart = differences(stock, lean)
    assert apart == []


@pytest.mark.parametrize("name", ["from_pretrained", "from_pretrained_no_processing"])
def test_arguments_are_stocks(name: str) -> None:
    """Same names, order and defaults, so that positional calls mean the same."""
    wanted = inspect.signature(getattr(HookedTransformer, name)).parameters
    found = inspect.signature(getattr(LeanHookedTransformer, name + "_lean")).parameters
    plain = [one for one in wanted.values() if one.kind is not one.VAR_KEYWORD]
    own = {"strategy": "auto", "mmap": "auto", "progress": None}
    if name == "from_pretrained":
        same = [(one.name, one.default) for one in plain]
        assert [(one.name, one.default) for one in found.values()][: len(plain)] == same
        assert {key: found[key].default for key in own} == own
        assert all(found[key].kind is found[key].KEYWORD_ONLY for key in own)
    else:
        for parameter in plain[:6]:
            assert found[parameter.name].default == parameter.default, parameter.name


HF_MODELS = ("gpt2", "neox", "bloom", "llama-gqa1-tied", "gemma2", "mixtral", "gpt-oss", "qwen")


@pytest.mark.parametrize("flags", [{}, RAW], ids=["processed", "unprocessed"])
@pytest.mark.parametrize("case_id", HF_MODELS)
def test_hf_model(case_id: str, flags: dict[str, bool], zoo: Any) -> None:
    """The same numbers as from its folder; the caller's model neither changes nor is shared."""
    folder = zoo(case_id)
    hf_model = hf_model_of(case_id, folder)
    before, addresses = values(hf_model), _addresses(hf_model)
    stock = stock_model(case_id, folder, hf_model=hf_model_of(case_id, folder), **flags)
    lean = lean_model(folder, hf_model=hf_model, **flags)
    apart = differences(stock, lean, cfg_apart=NAMES)
    assert apart == []
    assert lean.load_report.source == "hf_model"
    assert changed(before, hf_model) == []
    assert _addresses(hf_model) == addresses
    loaded = values(lean)
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.fill_(3)
    assert changed(loaded, lean) == []
    with torch.no_grad():
        for parameter in lean.parameters():
            parameter.fill_(5)
    assert all((parameter == 3).all() for parameter in hf_model.parameters())


def hf_model_of(case_id: str, folder: Any, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of a case, or a bare tree where it has no code."""
    if CASES[case_id].kind == "raw":
        return reference.raw_module(folder, dtype)
    return reference.hf_model(case_id, folder, dtype)


def _addresses(model: torch.nn.Module) -> list[tuple[str, int, bool]]:
    return [(name, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()]


@pytest.mark.parametrize("held_in", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loaded_in", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
def test_hf_model_of_another_dtype(
    case_id: str, held_in: torch.dtype, loaded_in: torch.dtype, zoo: Any
) -> None:
    folder = zoo(case_id)
    for flags in ({}, RAW):
        hf_models = [reference.hf_model(case_id, folder, held_in) for _ in range(2)]
        stock = stock_model(case_id, folder, hf_model=hf_models[0], dtype=loaded_in, **flags)
        lean = lean_model(folder, hf_model=hf_models[1], dtype=loaded_in, **flags)
        apart = differences(stock, lean, cfg_apart=NAMES)
        assert apart == []
        assert {p.dtype for p in hf_models[1].parameters()} == {held_in}


@pytest.mark.parametrize("name", ["nobody/ever-heard-of-this", "my llama", "t5-gpt", "gpt2"])
def test_hf_model_under_any_name(name: str, zoo: Any) -> None:
    folder = zoo("llama-gqa")
    hf_model = reference.hf_model("llama-gqa", folder)
    lean = lean_model(name, hf_model=hf_model)
    apart = differences(lean_model(folder), lean, cfg_apart=NAMES)
    assert apart == []
    assert lean.cfg.model_name == name.rpartition("/")[2]


def test_hf_model_that_was_edited(zoo: Any) -> None:
    """What counts is the model in memory, not the folder that it once came from."""
    folder = zoo("llama-gqa")
    hf_model = reference.hf_model("llama-gqa", folder)
    with torch.no_grad():
        hf_model.lm_head.weight.mul_(2)
    lean = lean_model(folder, hf_model=hf_model, **RAW)
    assert torch.equal(lean.unembed.W_U, lean_model(folder, **RAW).unembed.W_U * 2)


def test_what_is_no_hf_model() -> None:
    with pytest.raises(ArgumentError, match="hf_model"):
        lean_model("gpt2", hf_model=torch.nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", torch.float64, "float32"])
def test_dtype_by_name_or_object(dtype: Any, zoo: Any) -> None:
    lean = lean_model(zoo("llama-gqa"), dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in lean.parameters()} == {wanted}
    assert lean.cfg.dtype == lean.load_report.dtype == wanted


def test_torch_dtype_wins_over_dtype(zoo: Any) -> None:
    folder = zoo("llama-gqa")
    arguments = {"dtype": "float32", "torch_dtype": torch.bfloat16}
    apart = differences(
        stock_model("llama-gqa", folder, **arguments), lean_model(folder, **arguments)
    )
    assert apart == []


@pytest.mark.parametrize("first_n_layers", [0, 1, 2])
@pytest.mark.parametrize("case_id", ["gpt2", "neox", "llama-gqa", "gemma2", "mixtral", "solu-old"])
def test_first_n_layers(case_id: str, first_n_layers: int, zoo: Any) -> None:
    folder = zoo(case_id)
    stock = stock_model(case_id, folder, first_n_layers=first_n_layers)
    lean = lean_model(folder, first_n_layers=first_n_layers)
    apart = differences(stock, lean)
    assert apart == []
    assert len(lean.blocks) == first_n_layers


@pytest.mark.parametrize("first_n_layers", [-1, 99, "two", 1.5])
def test_a_number_of_layers_that_makes_no_sense(first_n_layers: Any, zoo: Any) -> None:
    with pytest.raises(ArgumentError, match="first_n_layers"):
        lean_model(zoo("gpt2"), first_n_layers=first_n_layers)


@pytest.mark.parametrize(
    "case_id", ["neox", "llama-gqa", "llama3-rope", "gemma2", "bloom", "gpt-oss", "mistral"]
)
def test_a_smaller_n_ctx(case_id: str, zoo: Any) -> None:
    assert case_id not in STOCK_SKIPS["smaller n_ctx"]
    folder = zoo(case_id)
    stock, lean = stock_model(case_id, folder, n_ctx=12), lean_model(folder, n_ctx=12)
    apart = differences(stock, lean)
    assert apart == []
    wanted = run(lean_model(folder), case_id)[0]
    assert torch.equal(run(lean, case_id)[0], wanted)


@pytest.mark.parametrize("tokenizer", [True, False], ids=["tokenizer", "none"])
@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"default_prepend_bos": False},
        {"default_prepend_bos": True},
        {"default_padding_side": "left"},
        {"default_padding_side": "right", "default_prepend_bos": False},
    ],
    ids=str,
)
def test_tokenizer(chosen: dict[str, Any], tokenizer: bool, zoo: Any) -> None:
    folder = zoo("llama-gqa", tokenizer=tokenizer)
    stock, lean = stock_model("llama-gqa", folder, **chosen), lean_model(folder, **chosen)
    apart = differences(stock, lean)
    assert apart == []
    assert lean.load_report.notes == ()
    if not tokenizer:
        assert lean.tokenizer is stock.tokenizer is None
        return
    texts = ["w5 w7", "w9 w8 w3"]
    assert torch.equal(lean.to_tokens(texts), stock.to_tokens(texts))
    assert lean.to_string(lean.to_tokens("w5 w7")) == stock.to_string(stock.to_tokens("w5 w7"))
    assert lean.tokenizer.padding_side == stock.tokenizer.padding_side


def test_the_callers_tokenizer(zoo: Any) -> None:
    folder = zoo("llama-gqa")
    tokenizer = AutoTokenizer.from_pretrained(zoo("gpt2", tokenizer=True))
    stock = stock_model("llama-gqa", folder, tokenizer=copy.deepcopy(tokenizer))
    lean = lean_model(folder, tokenizer=tokenizer)
    apart = differences(stock, lean, cfg_apart=NAMES)
    assert apart == []
    assert lean.to_tokens("w5").tolist() == stock.to_tokens("w5").tolist()


STRATEGIES = ("auto", "assign", "copy")


@pytest.mark.parametrize("flags", [{}, RAW], ids=["processed", "unprocessed"])
@pytest.mark.parametrize("case_id", SEVERAL)
def test_strategies_give_equal_models(case_id: str, flags: dict[str, bool], zoo: Any) -> None:
    folder = zoo(case_id)
    auto, assign, copied = (lean_model(folder, strategy=name, **flags) for name in STRATEGIES)
    for model in (assign, copied):
        apart = differences(auto, model)
        assert apart == []
    torch.testing.assert_close(run(copied, case_id)[0], run(assign, case_id)[0])
    assert [m.load_report.strategy for m in (auto, assign, copied)] == ["assign", "assign", "copy"]
    assert str(compat.TORCH) in auto.load_report.reason
    assert copied.load_report.reason == assign.load_report.reason == "as asked for"
    assert copied.load_report.mapped_bytes == 0


def test_an_old_torch_copies(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = zoo("llama-gqa")
    wanted = lean_model(folder)
    monkeypatch.setattr(compat, "TORCH", Version("2.0.1"))
    lean = lean_model(folder)
    apart = differences(wanted, lean)
    assert apart == []
    assert lean.load_report.strategy == "copy"
    assert "2.0.1" in lean.load_report.reason
    with pytest.raises(StrategyError, match=r"2\.1.*2\.0\.1"):
        lean_model(folder, strategy="assign")


@pytest.mark.parametrize("flags", [{}, RAW], ids=["processed", "unprocessed"])
@pytest.mark.parametrize("case_id", SEVERAL)
def test_mapping_changes_no_number(case_id: str, flags: dict[str, bool], zoo: Any) -> None:
    folder = zoo(case_id)
    auto, mapped, read = (lean_model(folder, mmap=mmap, **flags) for mmap in ("auto", True, False))
    for model in (auto, mapped):
        apart = differences(read, model, gaps=model is mapped)
        assert apart == []
    torch.testing.assert_close(run(mapped, case_id)[0], run(read, case_id)[0])
    assert read.load_report.mapped_bytes == 0
    # Q, K and V of a fused matrix, which only mmap=True leaves in there.
    views = [p for p in mapped.parameters() if not is_dense(p)]
    assert bool(views) is (bool(flags) and case_id in ("gpt2", "neox"))
    gathered_bytes = mapped.load_report.mapped_bytes - auto.load_report.mapped_bytes
    assert gathered_bytes == sum(view.nbytes for view in views)
    if flags:
        assert 0.5 < mapped.load_report.mapped_bytes / mapped.load_report.parameter_bytes <= 1


def test_parameters_of_a_mapped_model_are_its_own(zoo: Any) -> None:
    """Tied weights lie at one place of the file; writing to one must not change the other."""
    folder = zoo("llama-gqa1-tied")
    file = folder / "model.safetensors"
    before = file.read_bytes()
    lean = lean_model(folder, mmap=True, **RAW)
    wanted = values(lean)
    with torch.no_grad():
        lean.embed.W_E.fill_(7)
    assert changed(wanted, lean) == ["embed.W_E"]
    assert file.read_bytes() == before


def test_staying_on_the_cpu(zoo: Any) -> None:
    folder = zoo("llama-gqa")
    lean = LeanHookedTransformer.from_pretrained_lean(folder, device="cpu", move_to_device=False)
    apart = differences(stock_model("llama-gqa", folder, move_to_device=False), lean)
    assert apart == []
    assert lean.load_report.device == "cpu"


def test_training_goes_as_with_stock(zoo: Any) -> None:
    losses = []
    for model in (stock_model("llama-gqa", zoo("llama-gqa")), lean_model(zoo("llama-gqa"))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(tokens("llama-gqa"), return_type="loss")
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-4)
    assert losses[5] < losses[3]


WRONG: dict[str, dict[str, Any]] = {
    "strategy": {"strategy": "fast"},
    "mmap": {"mmap": "sometimes"},
    "n_ctx": {"n_ctx": 0},
    "dtype": {"dtype": "float33"},
    "fold_lm": {"fold_lm": True},
    "device_map": {"device_map": "many"},
    "refactor_factored_attn_matrices": {"refactor_factored_attn_matrices": True},
}


@pytest.mark.parametrize(("name", "arguments"), WRONG.items())
def test_wrong_arguments(name: str, arguments: dict[str, Any], zoo: Any) -> None:
    with pytest.raises(ArgumentError, match=name):
        lean_model(zoo("llama-gqa"), **arguments)


@pytest.mark.parametrize(
    ("model_type", "architecture", "server"),
    [
        ("t5", "T5ForConditionalGeneration", "HookedEncoderDecoder"),
        ("bert", "BertForMaskedLM", "HookedEncoder"),
    ],
)
def test_encoders_are_sent_elsewhere(
    model_type: str, architecture: str, server: str, tmp_path: Path
) -> None:
    config = {"architectures": [architecture], "model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedArchitectureError, match=rf"\b{server}\b"):
        lean_model(tmp_path)
