"""The empty model: no random numbers, right buffers, and where each part goes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tl_fastload.hooked.empty import build_empty, device_map
from tl_fastload.huggingface import empty as modules


def config(**changes: Any) -> HookedTransformerConfig:
    values = {"n_layers": 2, "d_model": 6, "n_ctx": 5, "d_head": 3, "d_vocab": 11, "seed": None}
    more = {"act_fn": "relu", "device": "cpu", "default_prepend_bos": True}
    return HookedTransformerConfig.from_dict({**values, **more, **changes})


def origin(trust: bool = False) -> Any:
    keywords = SimpleNamespace(trust_remote_code=trust)
    return SimpleNamespace(keywords=keywords, tokenizer_folder=lambda: None)


def build(cfg: Any = None, cls: type = HookedTransformer, **options: Any) -> tuple[Any, list[str]]:
    notes: list[str] = []
    return build_empty(cls, cfg or config(), notes, **options), notes


def test_no_random_number_is_drawn() -> None:
    state = torch.get_rng_state()
    build()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("positional", ["standard", "rotary", "alibi"])
def test_buffers_are_what_transformer_lens_makes(positional: str) -> None:
    rotary = {"rotary_dim": 2} if positional == "rotary" else {}
    cfg = config(positional_embedding_type=positional, **rotary)
    wanted = dict(HookedTransformer(cfg).named_buffers())
    found = dict(build(cfg)[0].named_buffers())
    assert found.keys() == wanted.keys()
    for name, buffer in wanted.items():
        assert torch.equal(found[name], buffer), name


def test_experts_get_the_models_dtype() -> None:
    moe = {"num_experts": 2, "experts_per_token": 1, "d_mlp": 8, "gated_mlp": True}
    cfg = config(**moe, act_fn="silu", dtype=torch.bfloat16)
    model, notes = build(cfg)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert "bfloat16" in notes[0]
    assert build(config(**moe, act_fn="silu"))[1] == []


def test_a_tokenizer_that_is_not_there_is_a_note() -> None:
    model, notes = build(config(tokenizer_name="somebody/no-such-tokenizer", d_vocab=11))
    assert model.tokenizer is None
    assert "somebody/no-such-tokenizer" in notes[0]


def test_an_error_of_the_class_is_not_swallowed() -> None:
    class Picky(HookedTransformer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError("not me")

    cfg = config()
    with pytest.raises(ValueError, match="not me"):
        build(cfg, Picky)


def test_trust_is_the_callers_and_only_while_building() -> None:
    seen = []

    class Looking(HookedTransformer):
        def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
            seen.append(cfg.trust_remote_code)
            super().__init__(cfg, *args, **kwargs)

    cfg = config(trust_remote_code=True)
    build(cfg, Looking)
    assert seen == [False]
    assert cfg.trust_remote_code is True


def model_of(**cfg: Any) -> Any:
    values = {"device": "cpu", "n_devices": 1, "n_layers": 4}
    return SimpleNamespace(cfg=SimpleNamespace(**{**values, **cfg}))


def test_one_device() -> None:
    assert device_map(model_of(device="cuda:1"), True)("embed.W_E") == torch.device("cuda:1")
    assert device_map(model_of(device="cuda"), False)("embed.W_E") == torch.device("cpu")
    assert device_map(model_of(device=None), True)("embed.W_E") == torch.device("cpu")


def test_several_devices() -> None:
    device_of = device_map(model_of(device="cuda", n_devices=2), True)
    places = {
        "embed.W_E": 0,
        "pos_embed.W_pos": 0,
        "blocks.0.attn.W_Q": 0,
        "blocks.1.mlp.W_in": 0,
        "blocks.2.attn.W_Q": 1,
        "blocks.3.mlp.W_in": 1,
        "ln_final.w": 1,
        "unembed.W_U": 1,
    }
    for name, index in places.items():
        assert device_of(name) == torch.device("cuda", index), name


def test_memory_of_a_mask_is_given_back_before_parameters_take_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(modules, "return_freed_memory", lambda: calls.append("given back"))
    with modules.SkipRandomInit():
        torch.empty(4)
        assert not calls
        torch.tril(torch.ones(3, 3))
        torch.empty(4)
        torch.empty(4)
    assert calls == ["given back"]


def test_initializers_do_nothing_of_a_model_on_meta() -> None:
    weight, seen = torch.full((2, 3), 7.0), []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch(), modules.SkipInitializers():
        for initialize in (torch.nn.init.kaiming_uniform_, torch.nn.init.normal_):
            assert initialize(weight) is weight
        assert seen == []
        torch.nn.init.ones_(weight[0])  # any other runs
    assert weight.tolist() == [[1.0] * 3, [7.0] * 3]
