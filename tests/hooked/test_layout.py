"""Parameters lie in memory as the forward pass wants them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens import HookedTransformer

from tests.support import reference
from tests.support.comparison import lean_model, stock_model
from tests.support.zoo import CASES, tokens
from tl_fastload.ground import geometry

_COPYING = ("clone", "_to_copy", "copy_", "contiguous", "_reshape_copy")

ONE_OF_EACH = {case.architecture: name for name, case in reversed(CASES.items())}.values()
# Their files hold each matrix as the forward pass wants it, so that mapping them costs nothing;
# the others interleave the heads of Q, K and V, hold [in, out], or TransformerLens' own order.
MAPS_WELL = [
    name
    for name in ONE_OF_EACH
    if CASES[name].architecture
    in (
        "GPTNeoForCausalLM OPTForCausalLM GPTJForCausalLM LlamaForCausalLM MistralForCausalLM "
        "MixtralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM PhiForCausalLM Phi3ForCausalLM "
        "GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration "
        "OlmoForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoeForCausalLM ApertusForCausalLM "
        "GptOssForCausalLM"
    ).split()
]


class WeightCopies(TorchDispatchMode):
    """Collects the names of matrices of a model that are copied whole while it runs."""

    def __init__(self, model: HookedTransformer) -> None:
        super().__init__()
        matrices = {n: p for n, p in model.named_parameters() if "W_" in n}
        self.places = {p.data_ptr(): (p.numel(), n) for n, p in matrices.items()}
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _COPYING:
            for tensor in args:
                if isinstance(tensor, torch.Tensor) and tensor.data_ptr() in self.places:
                    size, name = self.places[tensor.data_ptr()]
                    self.names += [name] if size == tensor.numel() else []
        return func(*args, **(kwargs or {}))


def copied_matrices(model: HookedTransformer, case_id: str) -> list[str]:
    with torch.no_grad(), WeightCopies(model) as copies:
        model(tokens(case_id))
    return sorted(copies.names)


@pytest.mark.parametrize("case_id", ONE_OF_EACH)
def test_a_processed_model_runs_without_copying_a_matrix(case_id: str, zoo: Any) -> None:
    assert copied_matrices(lean_model(zoo(case_id)), case_id) == []


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "gemma2"])
def test_stock_copies_nearly_all_of_them(case_id: str, zoo: Any) -> None:
    """So the collector works, and this is what is won."""
    model = stock_model(case_id, zoo(case_id))
    assert len(copied_matrices(model, case_id)) >= 3 * model.cfg.n_layers


@pytest.mark.parametrize("case_id", MAPS_WELL)
def test_a_mapped_model_runs_without_copying_a_matrix(case_id: str, zoo: Any) -> None:
    lean = lean_model(zoo(case_id), mmap=True, **reference.NO_PROCESSING)
    assert lean.load_report.mapped_bytes > 0
    assert copied_matrices(lean, case_id) == []


@pytest.mark.parametrize("case_id", [name for name in ONE_OF_EACH if name not in MAPS_WELL])
def test_no_mapped_model_copies_more_than_stock(case_id: str, zoo: Any) -> None:
    folder = zoo(case_id)
    lean = lean_model(folder, mmap=True, **reference.NO_PROCESSING)
    stock = stock_model(case_id, folder, **reference.NO_PROCESSING)
    assert set(copied_matrices(lean, case_id)) <= set(copied_matrices(stock, case_id))


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copied_keeps_the_values_and_takes_the_strides(
    order: tuple[int, ...], dtype: torch.dtype
) -> None:
    shape = (3, 5, 7)
    for source_order in itertools.permutations(range(3)):
        strides = torch.empty([shape[i] for i in order]).permute(_inverse(order)).stride()
        source = torch.randn([shape[i] for i in source_order]).permute(_inverse(source_order))
        copy = geometry.copied(source, strides, dtype)
        assert copy.stride() == strides
        assert copy.dtype == dtype
        assert torch.equal(copy, source.to(dtype))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(dim) for dim in range(len(order)))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((12, 4, 1), (12, 4, 1), True),
        ((12, 4, 1), (99, 4, 1), True),  # the first dimension has one element
        ((12, 4, 1), (12, 1, 3), False),
    ],
)
def test_same_layout(one: tuple[int, ...], other: tuple[int, ...], same: bool) -> None:
    assert geometry.same_layout(torch.Size((1, 3, 4)), one, other) is same
