"""Nobody's memory but the model's own: the caller's tensors, tied weights, the files."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import reference
from tests.support import zoo as bed
from tests.support.zoo import CASES
from tl_fastload import LeanHookedTransformer

Lean = LeanHookedTransformer
RAW = reference.NO_PROCESSING
SOME = ["gpt2", "llama-gqa1-tied", "neox", "phi3", "bloom", "mixtral", "gemma2", "qwen"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def load(source: Any, **arguments: Any) -> Any:
    return Lean.from_pretrained_lean(source, **{"device": "cpu", "progress": False, **arguments})


def hf_model(case_id: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return reference.hf_model(case_id, folder, dtype) or reference.raw_module(folder, dtype)


def digest(model: Any) -> dict[str, str]:
    """The bytes of every parameter and buffer, by name."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: hashlib.sha1(
            bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
        ).hexdigest()
        for name, tensor in state.items()
    }


def files(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha1(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def log_probs(model: Any, case_id: str) -> torch.Tensor:
    with torch.no_grad():
        return reference.log_probs(model(bed.tokens(case_id)))


def fill_all(model: Any, value: float) -> None:
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(value)


def assert_independent(model: Any) -> None:
    """Writing to one parameter or buffer changes no other."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    clean = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        for number, tensor in enumerate(model.parameters()):
            tensor.fill_(number + 1)
    for number, (name, tensor) in enumerate(model.named_parameters()):
        assert (tensor == number + 1).all(), name
    # Other aliases: a buffer on a parameter.
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, clean[name]), name


def _cases_and_roads() -> list[tuple[str, str]]:
    """Mapped, where memory could be shared, for all cases; one of the other roads for each."""
    others = ("read", "processed", "copied")
    roads = [(case_id, "mapped") for case_id in CASES]
    return roads + [(case_id, others[n % len(others)]) for n, case_id in enumerate(CASES)]


@pytest.mark.parametrize(("case_id", "how"), _cases_and_roads())
def test_every_parameter_has_its_own_memory(case_id: str, how: str, zoo: Any) -> None:
    folder = zoo(case_id)
    before = files(folder)
    options = {
        "mapped": {**RAW, "mmap": True},
        "read": {**RAW, "mmap": False},
        "processed": {},
        "copied": {**RAW, "strategy": "copy"},
    }[how]
    model = load(folder, **options)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert_independent(model)
    del model
    assert files(folder) == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case_id", SOME)
def test_the_callers_model_is_left_alone(case_id: str, dtype: torch.dtype, zoo: Any) -> None:
    is_raw = (SOME.index(case_id) + DTYPES.index(dtype)) % 2 == 1
    folder, flags = zoo(case_id), RAW if is_raw else {}
    source = hf_model(case_id, folder)
    before, config = digest(source), copy.deepcopy(source.config.to_dict())
    model = load(folder, hf_model=source, dtype=dtype, **flags)
    assert digest(source) == before
    assert source.config.to_dict() == config
    mine = digest(model)
    fill_all(source, 3.0)
    assert digest(model) == mine
    theirs = digest(source)
    fill_all(model, 5.0)
    assert digest(source) == theirs
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}


@pytest.mark.parametrize("strategy", ["assign", "copy"])
def test_in_the_models_own_dtype_too(strategy: str, zoo: Any) -> None:
    source = hf_model("llama-gqa1-tied", zoo("llama-gqa1-tied"), torch.bfloat16)
    model = load("somebody/llama", hf_model=source, dtype="bfloat16", strategy=strategy, **RAW)
    mine = digest(model)
    fill_all(source, 3.0)
    assert digest(model) == mine
    assert_independent(model)


def test_settings_and_hooks_of_the_callers_model(zoo: Any) -> None:
    folder = zoo("gpt2")
    source = hf_model("gpt2", folder)
    calls: list[int] = []
    source.transformer.h[0].register_forward_hook(lambda *_: calls.append(1))
    source.transformer.wte.weight.requires_grad_(False)
    source.train()
    source.transformer.h[1].eval()
    source.transformer.ln_f.weight.grad = torch.ones(30)
    identities = {name: id(tensor) for name, tensor in source.named_parameters()}
    state = {name: (p.requires_grad, p.grad) for name, p in source.named_parameters()}
    modes = [module.training for module in source.modules()]
    attributes = {name: sorted(module.__dict__) for name, module in source.named_modules()}
    model = load(folder, hf_model=source)
    assert {name: id(tensor) for name, tensor in source.named_parameters()} == identities
    assert {name: (p.requires_grad, p.grad) for name, p in source.named_parameters()} == state
    assert [module.training for module in source.modules()] == modes
    assert {name: sorted(module.__dict__) for name, module in source.named_modules()} == attributes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not calls
    source(input_ids=bed.tokens("gpt2"))
    assert calls


def test_inference_tensors_and_frozen_models_can_be_a_source(zoo: Any) -> None:
    folder = zoo("llama-gqa1-tied")
    with torch.inference_mode():
        source = hf_model("llama-gqa1-tied", folder)
        source = copy.deepcopy(source)
    source.requires_grad_(False)
    model = load(folder, hf_model=source)
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
    assert digest(model) == digest(load(folder))


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_loading_inside_no_grad(inference: Any, zoo: Any) -> None:
    with inference():
        model = load(zoo("gpt2"))
    assert digest(model) == digest(load(zoo("gpt2")))
    if inference is torch.no_grad:
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("how", ["mapped", "processed", "copied"])
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa1-tied", "neox", "mixtral", "gpt-oss"])
def test_a_loaded_model_trains(case_id: str, how: str, zoo: Any) -> None:
    folder = zoo(case_id)
    before = files(folder)
    options = {"mapped": {**RAW, "mmap": True}, "processed": {}, "copied": {"strategy": "copy"}}
    model = load(folder, **options[how])
    start = digest(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(bed.tokens(case_id), return_type="loss")
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    leaves = list(model.parameters())
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in leaves)
    changed = [name for name, value in digest(model).items() if value != start[name]]
    assert "unembed.W_U" in changed
    assert "blocks.0.attn.W_Q" in changed
    del model, optimizer, loss
    assert files(folder) == before


@pytest.mark.parametrize("flags", [{}, RAW], ids=["processed", "raw"])
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa1-tied", "neox"])
def test_a_callers_state_dict_is_left_alone(case_id: str, flags: Any, zoo: Any) -> None:
    state = {k: v.clone() for k, v in load(zoo(case_id), **RAW).state_dict().items()}
    model = load(zoo(case_id), **RAW)
    before = {name: value.clone() for name, value in state.items()}
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    model.load_and_process_state_dict(state, **flags)
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in state)
    # Folded norms are other modules, without parameters.
    assert all(identities[name] == id(p) for name, p in model.named_parameters())
    mine = digest(model)
    for value in state.values():
        value.zero_()
    assert digest(model) == mine
    if flags is RAW:
        assert mine == digest(load(zoo(case_id), **RAW))
    assert_independent(model)


@pytest.mark.parametrize("case_id", CASES)
def test_processing_in_place_is_processing_on_load(case_id: str, zoo: Any) -> None:
    """On every architecture, with parameters whose values other parameters' recipes read."""
    expected = load(zoo(case_id), **({"fold_value_biases": False} if case_id == "gpt-oss" else {}))
    model = load(zoo(case_id), **RAW)
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    before = log_probs(model, case_id)
    model.process_weights_()
    assert (log_probs(model, case_id) - before).abs().max() < 1e-4
    assert all(identities[name] == id(p) for name, p in model.named_parameters())
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():  # strides differ, and with them the rounding of means
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    assert model.load_report.processing == expected.load_report.processing or case_id == "gpt-oss"
    assert not any("NaN" in note for note in model.load_report.notes)


@pytest.mark.parametrize("flags", [{}, RAW], ids=["processed", "raw"])
def test_layers_that_change_places(flags: Any, zoo: Any) -> None:
    """A model's own state dict under other names: each tensor is read before it is overwritten."""

    def swapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        other = {"blocks.0.": "blocks.1.", "blocks.1.": "blocks.0."}
        return {other.get(name[:9], name[:9]) + name[9:]: value for name, value in state.items()}

    model, expected = (load(zoo("gpt2"), **RAW) for _ in range(2))
    copies = {
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in expected.state_dict().items()
    }
    expected.load_and_process_state_dict(swapped(copies), **flags)
    model.load_and_process_state_dict(swapped(model.state_dict()), **flags)
    assert digest(model) == digest(expected)


@pytest.mark.parametrize("case_id", ["othello", "solu", "attn-only"])
def test_torch_files_are_not_written_to(case_id: str, zoo: Any) -> None:
    folder = zoo(case_id)
    before = files(folder)
    model = load(folder, **RAW)
    fill_all(model, 4.0)
    del model
    assert files(folder) == before


def test_two_loads_share_nothing(zoo: Any) -> None:
    one, other = (load(zoo("llama-gqa1-tied"), mmap=True, **RAW) for _ in range(2))
    values = digest(other)
    fill_all(one, 1.0)
    assert digest(other) == values
