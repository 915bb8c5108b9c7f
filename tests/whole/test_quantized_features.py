"""What a researcher does with a model works on a quantized one, as on the dequantized one."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformer_lens import patching
from transformer_lens.head_detector import detect_head

from tests.support import quantized_packed as packed
from tests.support import quantized_zoo as qz
from tests.support import zoo as zoo_module
from tests.support.comparison import lean_model

CASES_AND_KINDS = (
    ("gpt2", "int8"),
    ("gpt2", "nf4-double"),
    ("llama-gqa", "int8"),
    ("neox", "nf4-double"),
    ("neox", "fp8-ends"),
    ("llama-gqa", "ct-int-groups"),
    ("gpt-oss", "mxfp4"),
    ("gpt2", "gptq-reordered"),
    ("neox", "awq"),
    ("gpt2", "packed-zeros"),
    ("llama-gqa", "torchao-groups"),
    ("llama-gqa", "gguf"),
)
# How far the model may lie from the dequantized one: 8-bit kernels round activations to 127 steps.
BOUND = {"int8": 4e-2, **dict.fromkeys(("nf4-double", *packed.PACKINGS), 1e-5)}

Pair = tuple[Any, Any, torch.Tensor]


@pytest.fixture(params=CASES_AND_KINDS, ids="-".join)
def kind(request: Any) -> tuple[str, str]:
    """A case and a kind."""
    return tuple(request.param)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def made(zoo: Any) -> Callable[[tuple[str, str]], Pair]:
    """Makes the models of a case and a kind."""

    def make(kind: tuple[str, str]) -> Pair:
        case_id, name = kind
        folder = qz.build(zoo, case_id)
        dense = lean_model(qz.dense_folder(case_id, folder, name))
        return qz.load(folder, name), dense, zoo_module.tokens(case_id)

    return make


@pytest.fixture(scope="module")
def known(made: Callable[[tuple[str, str]], Pair]) -> Callable[[tuple[str, str]], Pair]:
    """`made`, once for each case and kind."""
    return functools.cache(made)


@pytest.fixture
def pair(kind: tuple[str, str], known: Callable[[tuple[str, str]], Pair]) -> Iterator[Pair]:
    """A quantized model, the dequantized one, and tokens. Tests share the models, and leave their
    weights and settings as they are.
    """
    pair = known(kind)
    before = [{**one.cfg.to_dict()} for one in pair[:2]]
    versions = [p._version for one in pair[:2] for p in one.parameters()]
    yield pair
    for one in pair[:2]:
        one.zero_grad()
    assert [one.cfg.to_dict() for one in pair[:2]] == before
    assert [p._version for one in pair[:2] for p in one.parameters()] == versions


def _assert_near(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    assert found.shape == expected.shape
    assert qz.relative_gap(found, expected) < bound


def _on_both(pair: Pair, act: Any, bound: float) -> None:
    """The results of `act(model, tokens)`, a tensor, lie close to each other."""
    model, dense, tokens = pair
    _assert_near(act(model, tokens), act(dense, tokens), bound)


def test_run_with_cache(kind: Any, pair: Pair) -> None:
    model, dense, tokens = pair
    logits, cache = model.run_with_cache(tokens)
    assert torch.equal(logits, model(tokens))
    _, expected = dense.run_with_cache(tokens)
    assert list(cache) == list(expected)
    for name in ("blocks.0.attn.hook_pattern", "blocks.1.hook_resid_post", "ln_final.hook_scale"):
        _assert_near(cache[name], expected[name], BOUND[kind[1]])


def test_run_with_hooks(kind: Any, pair: Pair) -> None:
    def ablate(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value[:, :, 1] = 0
        return value

    def act(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        hooked = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_z", ablate)])
        assert not torch.equal(hooked, model(tokens))
        return hooked

    _on_both(pair, act, BOUND[kind[1]])


def test_generate_with_a_key_value_cache(pair: Pair) -> None:
    model, _, tokens = pair
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False}
    found = [
        model.generate(tokens[:1, :4], 6, use_past_kv_cache=cached, **options)
        for cached in (True, False)
    ]
    assert found[0].shape == (1, 10)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "setting", ["attn_result", "split_qkv_input", "hook_mlp_in", "attn_in", "ungroup"]
)
def test_settings(kind: Any, pair: Pair, setting: str) -> None:
    """Some dequantize for each product; the numbers stay those of the dequantized weights."""
    model, dense, tokens = pair
    if setting == "attn_in" and model.cfg.n_key_value_heads:
        pytest.skip("TransformerLens has no attn_in for grouped heads")
    before = model(tokens)
    name = "ungroup_grouped_query_attention" if setting == "ungroup" else f"use_{setting}"
    for one in (model, dense):
        getattr(one, f"set_{name}")(True)
    (logits, cache), (expected, other) = model.run_with_cache(tokens), dense.run_with_cache(tokens)
    for one in (model, dense):
        getattr(one, f"set_{name}")(False)
    _assert_near(logits, expected, BOUND[kind[1]])
    _assert_near(logits, before, BOUND[kind[1]])
    assert list(cache) == list(other)
    if setting == "attn_result":
        weight = model.blocks[0].attn.W_O.detach().dequantize()
        results = torch.einsum("bphe,hed->bphd", cache["z", 0], weight)
        torch.testing.assert_close(cache["result", 0], results, rtol=1e-4, atol=1e-5)


def test_part_of_the_layers(kind: Any, pair: Pair) -> None:
    model, _, tokens = pair
    for layer in range(model.cfg.n_layers):
        residual = model(tokens, stop_at_layer=layer)
        with torch.no_grad():
            torch.testing.assert_close(model(residual, start_at_layer=layer), model(tokens))


def test_decompositions(kind: Any, pair: Pair) -> None:
    model, dense, tokens = pair
    (_, cache), (_, expected) = model.run_with_cache(tokens), dense.run_with_cache(tokens)
    heads = cache.stack_head_results(layer=2)
    _assert_near(heads, expected.stack_head_results(layer=2), BOUND[kind[1]])
    parts = cache.get_full_resid_decomposition(layer=2, expand_neurons=False)
    # Per-head results are of the dequantized weights, and the kernel rounds what it multiplies.
    _assert_near(
        parts.sum(0),
        cache["resid_pre", min(2, model.cfg.n_layers - 1)]
        if model.cfg.n_layers > 2
        else cache["resid_post", 1],
        BOUND[kind[1]],
    )
    layers = cache.decompose_resid(layer=2)
    _assert_near(layers, expected.decompose_resid(layer=2), BOUND[kind[1]])
    if not model.cfg.num_experts:  # TransformerLens stacks no neurons of experts
        _assert_near(
            cache.stack_neuron_results(layer=1),
            expected.stack_neuron_results(layer=1),
            BOUND[kind[1]],
        )
    _assert_near(
        cache.logit_attrs(layers, tokens=5),
        expected.logit_attrs(layers, tokens=5),
        2 * BOUND[kind[1]],
    )


@pytest.mark.parametrize("name", ["int8", "nf4-double"])
@pytest.mark.parametrize("pattern", ["previous_token_head", "duplicate_token_head"])
def test_head_detection(name: str, pattern: str, zoo: Any) -> None:
    folder = qz.build(lambda *a, **k: zoo(*a, tokenizer=True, **k), "gpt2")
    model = lean_model(folder, hf_model=qz.hf_model(folder, name))
    dense = lean_model(qz.dense_folder("gpt2", folder, name))
    text = "w1 w2 w3 w1 w2 w7 w8"
    found = detect_head(model, text, pattern)
    dense.set_tokenizer(model.tokenizer)
    _assert_near(found, detect_head(dense, text, pattern), BOUND[name])


def _metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, 5] - logits[0, -1, 9]


def test_activation_patching(kind: Any, pair: Pair) -> None:
    def act(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        clean, corrupted = tokens[:1, :5], tokens[1:, :5]
        with torch.no_grad():
            _, cache = model.run_with_cache(clean)
            return patching.get_act_patch_resid_pre(model, corrupted, cache, _metric)

    _on_both(pair, act, 2 * BOUND[kind[1]])


def test_attribution_patching(kind: Any, pair: Pair) -> None:
    """Gradients reach every activation and the embedding; none is built for quantized weights."""
    bound = max(3 * BOUND[kind[1]], 1e-4)

    def gradients(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}

        def keep(grad: torch.Tensor, hook: Any) -> None:
            found[hook.name] = grad.detach().clone()

        names = ("hook_embed", "hook_resid_pre", "hook_z", "hook_q", "hook_attn_out", "hook_post")
        with model.hooks(bwd_hooks=[(lambda name: name.endswith(names), keep)]):
            _metric(model(tokens)).backward()
        if kind[1] != "gguf":  # whose embeddings are quantized, too
            found["embed.W_E"] = model.embed.W_E.grad
        return found

    model, dense, tokens = pair
    ours, theirs = gradients(model, tokens), gradients(dense, tokens)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        _assert_near(ours[name], expected, bound)
    for weight in qz.quantized_parameters(model).values():
        assert weight.grad is None
        assert not weight.requires_grad
    biases = [p for name, p in model.named_parameters() if name.endswith("mlp.b_out")]
    assert all(bias.grad is not None for bias in biases)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_modes(pair: Pair, mode: Any) -> None:
    model, _, tokens = pair
    with torch.no_grad():
        expected = model(tokens)
    with mode():
        logits, cache = model.run_with_cache(tokens)
        again = model(tokens)
        assert model.W_Q.shape[0] == model.cfg.n_layers
        assert torch.equal(cache["resid_post", 0], model(tokens, stop_at_layer=1))
    assert torch.equal(logits, expected)
    assert torch.equal(again, expected)
    assert torch.equal(model(tokens), expected)


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _state_dict_into_another(model: Any) -> Any:
    file, other = io.BytesIO(), copy.deepcopy(model)
    torch.save(model.state_dict(), file)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=False))
    return other


COPIES: dict[str, Any] = {
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "state_dict": _state_dict_into_another,
    "to": lambda model: model.to("cpu"),
    "cpu": lambda model: model.cpu(),
    "eval": lambda model: model.eval(),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_second_forward_is_the_same(pair: Pair, name: str) -> None:
    model, _, tokens = pair
    with torch.no_grad():
        expected = model(tokens)
        other = COPIES[name](model)
        assert torch.equal(other(tokens), expected)
        assert torch.equal(other(tokens), expected)
        assert torch.equal(model(tokens), expected)
    assert qz.quantized_parameters(other).keys() == qz.quantized_parameters(model).keys()


def test_counts(pair: Pair) -> None:
    model, dense, _ = pair
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in dense.named_parameters()]
    counts = [sum(p.numel() for p in one.parameters()) for one in (model, dense)]
    assert counts[0] == counts[1]
    assert model.cfg.n_params == dense.cfg.n_params
    if hasattr(dense, "n_params_total"):
        assert model.n_params_total == counts[0]
    for (name, one), other in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device), name
        assert isinstance(one, torch.nn.Parameter)


def test_a_dtype_changes_what_is_computed_in(
    kind: Any, made: Callable[[tuple[str, str]], Pair]
) -> None:
    model, _, tokens = made(kind)  # which changes
    with torch.no_grad():
        expected = model(tokens)
    before = {
        name: {part: tensor.clone() for part, tensor in weight.content.stored.tensors().items()}
        for name, weight in qz.quantized_parameters(model).items()
    }
    size = sum(w.content.stored.nbytes() for w in qz.quantized_parameters(model).values())
    model.to(torch.bfloat16)
    weights = qz.quantized_parameters(model)
    assert sum(w.content.stored.nbytes() for w in weights.values()) == size
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        for part, tensor in weight.content.stored.tensors().items():
            assert torch.equal(tensor, before[name][part])
    with torch.no_grad():
        logits = model(tokens)
        assert torch.equal(model(tokens), logits)
    assert logits.dtype == torch.bfloat16
    _assert_near(logits.float(), expected, 6e-2)
