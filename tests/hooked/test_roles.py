"""What each parameter of a HookedTransformer is: told for all names, and true."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import reference
from tests.support.comparison import lean_model
from tests.support.zoo import CASES
from tl_fastload.ground import compat
from tl_fastload.ground.role import by_place
from tl_fastload.hooked.names import folded_norms, is_unread, role
from tl_fastload.hooked.steps import reason_to_skip

RAW = reference.NO_PROCESSING


def sides(cfg: Any) -> dict[str, set[int]]:
    """The lengths that each side of a parameter may have in a model."""
    names = ("d_model", "d_mlp", "d_head", "d_vocab", "d_vocab_out", "n_ctx")
    heads = {cfg.n_heads, cfg.n_key_value_heads or cfg.n_heads}
    return {
        **{name: {getattr(cfg, name)} for name in names},
        "d_normed": {n * cfg.d_head for n in (1, *heads)},
        "head": heads,
        "expert": {getattr(cfg, "num_experts", None) or 0},
    }


@pytest.mark.parametrize("case_id", CASES)
def test_every_name_of_every_architecture_has_a_role(case_id: str, zoo: Any) -> None:
    model = lean_model(zoo(case_id), **RAW)
    lengths = sides(model.cfg)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        found = role(name)
        assert found.part != "other", name
        assert found.kind != "table", name
        assert len(found.sides) == parameter.dim(), name
        for side, length in zip(found.sides, parameter.shape, strict=True):
            assert length in lengths[side], (name, side)
        assert (found.kind == "matrix") == bool(found.inputs), name
        assert found.is_bias == name.rpartition(".")[2].lstrip("_").startswith("b"), name
        in_block = name.startswith("blocks.")
        assert found.layer == (int(name.split(".")[1]) if in_block else None)
    for name, buffer in model.named_buffers():
        assert role(name).part != "other", name
        assert role(name).kind == ("table" if ".attn." in name else "other"), (name, buffer.shape)
    last = [name for name in parameters if role(name).is_last]
    assert all(name.startswith(("ln_final", "unembed")) for name in last)
    if role("ln_final.w").layer is None and "ln_final.w" in parameters:
        expected = {name for name in parameters if role(name).is_folded}
        assert expected <= {name for name, _ in folded_norms(model.cfg)}
        assert all(
            parameters[name].shape == (length,)
            for name, length in folded_norms(model.cfg)
            if name in parameters
        )


def test_matrices_out_in() -> None:
    expected = {
        "blocks.0.attn.W_Q": ((0, 2, 1), 2),
        "blocks.11.attn._W_K": ((0, 2, 1), 2),
        "blocks.0.attn.W_O": ((2, 0, 1), 1),
        "blocks.0.mlp.W_in": ((1, 0), 1),
        "blocks.0.mlp.W_out": ((1, 0), 1),
        "blocks.0.mlp.experts.3.W_out.weight": ((0, 1), 1),
        "blocks.0.mlp.W_gate.weight": ((0, 1), 1),
        "unembed.W_U": ((1, 0), 1),
    }
    assert {name: (role(name).order, role(name).n_outputs) for name in expected} == expected


def test_names_that_nobody_knows() -> None:
    for name in ("probe.weight", "attn.W_Q", "model.blocks.0.attn.W_Q", "blocks.0.mlp.W_new", ""):
        assert role(name).kind == role(name).part == "other"
    assert role("blocks.7.extra").layer == 7
    assert role("blocks.7._orig_mod.attn.W_Q") == role("blocks.7.attn.W_Q")
    assert role("module.embed.W_E") == role("embed.W_E")


CHANGED_BY = {
    "fold_ln": ("gpt2", "llama-gqa", "mixtral", "neox", "gptj", "solu", "gemma2"),
    "center_writing_weights": ("gpt2", "bloom", "solu"),
    "center_unembed": ("gpt2", "llama-gqa"),
    "fold_value_biases": ("gpt2", "qwen2"),
}


@pytest.mark.parametrize(
    ("step", "case_id"), [(step, name) for step, names in CHANGED_BY.items() for name in names]
)
def test_roles_say_what_stock_processing_changes(step: str, case_id: str, zoo: Any) -> None:
    raw = reference.stock_model(case_id, zoo(case_id), device="cpu", **RAW)
    done = reference.stock_model(case_id, zoo(case_id), device="cpu", **{**RAW, step: True})
    if reason_to_skip(step, raw.cfg) is not None:
        pytest.skip("this TransformerLens does not do it")
    before, after = dict(raw.named_parameters()), dict(done.named_parameters())
    changed = {n for n in before if n in after and not torch.allclose(before[n], after[n])}
    at = by_place(before, role)
    one_norm = (0, "MLP norm", False) not in at

    def has_norm(layer: int | None, norm: str) -> bool:
        shared = one_norm and norm == "MLP norm"
        return (layer, "attention norm" if shared else norm, False) in at

    roles = {name: role(name) for name in before if not is_unread(name, raw.cfg)}
    changed &= roles.keys() - {"unembed.b_U"}
    if step == "fold_ln":
        expected = {name for name, r in roles.items() if r.reads and has_norm(r.layer, r.reads)}
        changed = {name for name in changed if roles[name].kind == "matrix"}
        gone = before.keys() - after.keys() if compat.REPLACES_NORMS else set()
        assert all(roles[name].is_folded for name in gone)
    elif step == "center_writing_weights":
        expected = {name for name, r in roles.items() if r.writes is not None}
    elif step == "center_unembed":
        expected = {name for name, r in roles.items() if r.what == "unembedding" and r.inputs}
    else:
        expected = {
            name
            for name, r in roles.items()
            if r.kind == "bias" and r.what in ("value", "output") and r.part == "attention"
        }
    assert expected
    assert changed == expected
