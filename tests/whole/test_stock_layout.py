"""`layout="stock"` and `to_layout_`: what looks at memory order finds TransformerLens' own."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parameters_to_vector, prune
from transformer_lens import HookedTransformer

import tl_fastload
from tests.support import adapters, reference
from tests.support.comparison import differences, lean_model, memory_apart, stock_model, values
from tests.support.counting import AllocatedBytes
from tests.support.zoo import tokens
from tl_fastload import ArgumentError, LeanHookedTransformer
from tl_fastload.ground.geometry import same_layout
from tl_fastload.ground.memory_orders import LAYOUTS
from tl_fastload.hooked import layout
from tl_fastload.placement.own_values import parameter_versions as versions
from tl_fastload.planning.dry_run import OBJECTS_BYTES
from tl_fastload.quantized import QuantizedTensor

RAW = reference.NO_PROCESSING
FUSED = ("gpt2", "neox", "bloom", "phi3-gqa")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": lambda p, **more: torch.optim.SGD(p, momentum=0.9, **more),
    "Adagrad": torch.optim.Adagrad,
}


def pair(case_id: str, zoo: Any, **arguments: Any) -> tuple[HookedTransformer, Any]:
    """Stock's model, and the lean one in stock's layout."""
    folder = zoo(case_id)
    lean = lean_model(folder, layout="stock", **arguments)
    return stock_model(case_id, folder, **arguments), lean


def both(stock: nn.Module, lean: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    yield from zip(stock.parameters(), lean.parameters(), strict=True)


def give_gradients(*models: nn.Module, row_major: bool = True) -> None:
    """The same numbers to all: row-major, as `torch.autograd.grad` may, or in the parameter's
    order, as `backward` does.
    """
    for model in models:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = grad if row_major else torch.empty_like(parameter).copy_(grad)


def is_row_major(model: nn.Module) -> bool:
    return all(parameter.is_contiguous() for parameter in model.parameters())


def is_in_forward_order(model: nn.Module) -> bool:
    def wanted(name: str, parameter: nn.Parameter) -> tuple[int, ...]:
        module = model.get_submodule(name.rpartition(".")[0])
        return layout.forward_strides(module, name, parameter.shape)

    return all(
        same_layout(p.shape, p.stride(), wanted(name, p)) for name, p in model.named_parameters()
    )


@pytest.mark.parametrize("case_id", FUSED)
def test_every_unprocessed_parameter_is_dense_and_its_own(
    case_id: str, zoo: Any, tmp_path: Path
) -> None:
    """From wherever it comes; all other loads that are compared with stock's are looked at, too."""
    folder = zoo(case_id)
    hf = reference.hf_model(case_id, folder)
    adapter = adapters.for_case(case_id, folder, tmp_path / "adapter")
    torn = lean_model(folder, mmap=True, **RAW)  # said explicitly: views with gaps, which are saved
    assert bool(list(memory_apart(torn))) is (case_id != "phi3-gqa")
    torn.save_lean(tmp_path / "copy")
    assert is_row_major(torn.to_layout_("stock"))
    assert list(memory_apart(torn)) == []
    ways: dict[str, Any] = {
        "folder": lean_model(folder, **RAW),
        "in bfloat16": lean_model(folder, dtype=torch.bfloat16, **RAW),
        "bin": lean_model(zoo(case_id, bin=True), **RAW),
        "hf_model": lean_model(folder, hf_model=hf, **RAW),
        "adapter": lean_model(folder, adapter=adapter, **RAW),
        "copied": lean_model(folder, strategy="copy", **RAW),
        "copy": lean_model(tmp_path / "copy", **RAW),
    }
    for way, model in ways.items():
        assert list(memory_apart(model)) == [], way
    torch.save(ways["folder"].blocks[0].attn.W_Q, tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 1.5 * torn.blocks[0].attn.W_Q.nbytes + 2000


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("case_id", ["gpt2", "neox"])
def test_fused_optimizers_train_an_unprocessed_model(name: str, case_id: str, zoo: Any) -> None:
    folder, results = zoo(case_id), []
    for model in (stock_model(case_id, folder, **RAW), lean_model(folder, **RAW)):
        optimizer = OPTIMIZERS[name](model.parameters(), lr=1e-2, fused=True)
        for _ in range(2):
            give_gradients(model, row_major=False)
            optimizer.step()
        results.append(model)
    for stock, lean in both(*results):  # the last few elements in memory may round otherwise
        torch.testing.assert_close(lean, stock, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_optimizers_take_row_major_gradients_and_stocks_states(name: str, zoo: Any) -> None:
    stock, lean = pair("llama-gqa", zoo)
    first = OPTIMIZERS[name](stock.parameters(), lr=1e-2, fused=True)
    give_gradients(stock, lean)
    first.step()
    second = OPTIMIZERS[name](lean.parameters(), lr=1e-2, fused=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    lean.load_state_dict(stock.state_dict())
    for optimizer in (first, second):
        optimizer.step()
    assert differences(stock, lean) == []


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
def test_the_same_seed_draws_the_same_numbers(case_id: str, zoo: Any) -> None:
    def drawn(model: HookedTransformer) -> list[torch.Tensor]:
        torch.manual_seed(3)
        some = [torch.randn_like(p) for p in model.parameters()]
        some += [torch.dropout(p.detach(), 0.5, True) for p in model.parameters()]
        with torch.no_grad():
            some += [p.normal_().clone() for p in model.parameters()]
        torch.manual_seed(4)
        model.init_weights()
        return [*some, *values(model).values()]

    stock, lean = pair(case_id, zoo)
    for one, other in zip(drawn(stock), drawn(lean), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
def test_what_flattens_parameters_works_as_on_stock(case_id: str, zoo: Any, tmp_path: Path) -> None:
    stock, lean = pair(case_id, zoo)
    assert torch.equal(*(parameters_to_vector(m.parameters()) for m in (stock, lean)))
    for model, name in ((stock, "stock"), (lean, "lean")):
        save_file(model.state_dict(), tmp_path / name)
        loss = model(tokens(case_id), return_type="loss")
        loss.backward()
        for parameter in model.parameters():
            assert parameter.grad is None or parameter.grad.view(-1).stride() == (1,)
    one, other = (load_file(tmp_path / name) for name in ("stock", "lean"))
    assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())

    for model in (stock, lean):
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

        def closure(model: nn.Module = model) -> torch.Tensor:
            model.zero_grad()
            loss = torch.stack([p.square().sum() for p in model.parameters()]).sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert differences(stock, lean) == []
    for model in (stock, lean):
        pruned = [(block.attn, "W_Q") for block in model.blocks]
        prune.global_unstructured(pruned, prune.L1Unstructured, amount=0.5)  # type: ignore[no-untyped-call]
    assert torch.equal(stock.blocks[0].attn.W_Q_mask, lean.blocks[0].attn.W_Q_mask)


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
def test_a_live_model_changes_its_order_and_back(case_id: str, zoo: Any) -> None:
    model = lean_model(zoo(case_id))
    before, ids = values(model), [id(p) for p in model.parameters()]
    strides = [p.stride() for p in model.parameters()]
    model.blocks[0].attn.W_Q.requires_grad_(False)
    give_gradients(model, row_major=False)
    gradients = [p.grad for p in model.parameters()]
    expected = [g.clone() for g in gradients if g is not None]
    for order in ("stock", "stock", "forward"):
        assert model.to_layout_(order) is model
        assert is_row_major(model) is (order == "stock")
        assert [id(p) for p in model.parameters()] == ids
        for parameter, gradient, value in zip(model.parameters(), gradients, expected, strict=True):
            assert parameter.grad is gradient
            assert parameter.grad.stride() == parameter.stride()
            assert torch.equal(parameter.grad, value)
        after = values(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not list(memory_apart(model))
    assert strides == [p.stride() for p in model.parameters()]
    assert not model.blocks[0].attn.W_Q.requires_grad
    model.process_weights_()  # nothing to do: it is the model that was processed
    assert "nothing was done" in model.load_report.notes[-1]


def test_one_parameter_at_a_time(zoo: Any) -> None:
    model = lean_model(zoo("gpt2"), mmap=False)
    moved = [p.nbytes for p in model.parameters() if not p.is_contiguous()]
    with AllocatedBytes() as counted:
        model.to_layout_("stock")
        assert counted.peak == sum(moved)  # what lies there now; what it replaced is not counted
        model.to_layout_("forward")
    assert counted.peak == sum(moved) + max(moved)


def test_a_model_in_either_order_is_copied_pickled_and_filled(zoo: Any) -> None:
    model = lean_model(zoo("llama-gqa"), layout="stock")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_row_major(other)
        assert differences(model, other) == []
        assert is_in_forward_order(other.to_layout_("forward"))
        other.load_state_dict(model.state_dict())
        report = tl_fastload.load_weights_(other, model.state_dict())
        assert report.layout == "forward"
        assert is_in_forward_order(other)
        assert differences(model, other) == []


@pytest.mark.parametrize("how", [{}, {"mmap": False, "strategy": "copy"}], ids=str)
def test_copies_keep_their_order_or_get_the_one_asked_for(
    how: dict[str, Any], zoo: Any, tmp_path: Path
) -> None:
    models = {order: lean_model(zoo("gpt2"), layout=order) for order in LAYOUTS}
    for order, model in models.items():
        model.save_lean(tmp_path / order)
        # The usual order is not named: versions that know no other read such copies.
        said = (tmp_path / order / "tl_fastload.json").read_text().count('"layout": "stock"')
        assert said == (order == "stock")
    whole = sum(p.nbytes for p in models["stock"].parameters())
    moved = [p.nbytes for p in models["forward"].parameters() if not p.is_contiguous()]
    for saved, asked in itertools.product(LAYOUTS, (*LAYOUTS, None)):
        given = how if asked is None else {**how, "layout": asked}
        copied, order = lean_model(tmp_path / saved, **given), asked or saved
        planned = tl_fastload.plan(tmp_path / saved, device="cpu", **given)
        assert differences(models[order], copied) == []
        for one, other in both(models[order], copied):
            assert one.stride() == other.stride()
        assert copied.load_report.layout == planned.layout == copied._layout == order
        mapped = 0 if how else whole - sum(moved) * (order != saved)
        assert copied.load_report.mapped_bytes == planned.mapped_bytes == mapped
        buffers = sum(b.nbytes for b in models["stock"].buffers()) if how else 0
        held = whole - mapped + buffers + max(moved) * (order != saved)
        assert planned.peak_anonymous_bytes == held + OBJECTS_BYTES


def test_the_order_is_in_the_key_of_the_cache(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("llama-gqa")
    said = [
        lean_model(folder, cache=tmp_path, **arguments).load_report.cache.partition(":")[0]
        for arguments in ({}, {"layout": "forward"}, {"layout": "stock"}, {"layout": "stock"})
    ]
    assert said == ["filled", "hit", "filled", "hit"]
    assert is_row_major(lean_model(folder, cache=tmp_path, layout="stock"))
    assert is_in_forward_order(lean_model(folder, cache=tmp_path))


@pytest.mark.parametrize("flags", [{}, RAW], ids=["processed", "unprocessed"])
def test_every_road_takes_it_and_plans_it(flags: dict[str, bool], zoo: Any) -> None:
    folder = zoo("gpt2")
    for arguments in ({}, {"strategy": "copy"}, {"mmap": True}, {"hf_model": True}):
        if "hf_model" in arguments:
            arguments = {"hf_model": reference.hf_model("gpt2", folder)}
        given = {**flags, **arguments, "layout": "stock"}
        model = LeanHookedTransformer.from_pretrained(folder, device="cpu", **given)
        assert is_row_major(model)
        assert model.load_report.layout == "stock"
        plan = tl_fastload.plan(folder, device="cpu", **given)
        assert plan.mapped_bytes == model.load_report.mapped_bytes
        assert plan.layout == "stock"
        assert ("layout", "stock") in plan.rows()
        assert ("layout", "stock") in model.load_report.rows()


@pytest.mark.parametrize("value", ["rows", "", None, 1, ["stock"], torch.strided])
def test_orders_that_are_none(value: Any, zoo: Any) -> None:
    folder = zoo("gpt2")
    with pytest.raises(ArgumentError, match="layout="):
        lean_model(folder, layout=value)
    with pytest.raises(ArgumentError, match="layout="):
        lean_model(folder).to_layout_(value)


def tied(model: Any) -> None:
    model.unembed.W_U.data = model.embed.W_E.data.T


def one_parameter(model: Any) -> None:
    model.embed.W_more = model.unembed.W_U


def distributed(model: Any) -> None:
    class Sharded(nn.Parameter):
        pass

    model.blocks[0].attn.W_Q = Sharded(model.blocks[0].attn.W_Q.data)


def sparse(model: Any) -> None:
    model.blocks[0].attn.W_Q.grad = torch.zeros(model.blocks[0].attn.W_Q.shape).to_sparse()


CANNOT: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "tied": (tied, ("embed.W_E", "unembed.W_U", "share memory")),
    "one parameter": (one_parameter, ("embed.W_more", "unembed.W_U", "one parameter")),
    "shared": (lambda model: model.share_memory(), ("share_memory",)),
    "meta": (lambda model: model.blocks.to("meta"), ("blocks.0", "meta", "offloaded")),
    "distributed": (distributed, ("blocks.0.attn.W_Q", "Sharded", "layout=")),
    "sparse gradient": (sparse, ("blocks.0.attn.W_Q.grad", "sparse")),
}


@pytest.mark.parametrize("what", CANNOT)
def test_parameters_that_cannot_be_moved_are_named_and_nothing_changes(what: str, zoo: Any) -> None:
    model = lean_model(zoo("llama-gqa"))
    spoil, said = CANNOT[what]
    spoil(model)
    before = versions(model)
    strides = [p.stride() for p in model.parameters()]
    with pytest.raises(ArgumentError) as caught:
        # Row-major, both names of one parameter would want the same.
        model.to_layout_("forward" if what == "one parameter" else "stock")
    assert all(part in str(caught.value) for part in said)
    assert "Nothing was changed" in str(caught.value)
    assert versions(model) == before
    assert strides == [p.stride() for p in model.parameters()]


def test_quantized_parameters_stay_as_they_are(zoo: Any) -> None:
    model = lean_model(zoo("llama-gqa"), quantize="8bit")
    kept = {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    strides = {name: p.stride() for name, p in kept.items()}
    logits = model(tokens("llama-gqa"))
    model.to_layout_("stock")
    assert {name: p.stride() for name, p in kept.items()} == strides
    assert all(dict(model.named_parameters())[name] is p for name, p in kept.items())
    assert model.unembed.W_U.is_contiguous()
    torch.testing.assert_close(model(tokens("llama-gqa")), logits)
    other = lean_model(zoo("llama-gqa"), quantize="8bit", layout="stock")
    assert differences(model, other) == []
    assert other.unembed.W_U.is_contiguous()
