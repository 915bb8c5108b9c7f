"""Square matrices: TransformerLens 3 takes one side for the other, and we do not."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformerConfig
from transformers import AutoModelForCausalLM

from tests.support import reference
from tests.support.comparison import lean_model
from tests.support.quantized_zoo import hf_model as quantized_model
from tests.support.quantized_zoo import saved
from tests.support.tiny_configs import AVAILABLE, make_config
from tl_fastload import LeanHookedTransformer, load_weights_
from tl_fastload.ground.compat import GUESSES_SIDES, REPLACES_NORMS

TOLERANCE = 1e-4
_ALL_EQUAL = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
# Name -> architecture, keywords, how many kinds of matrix TransformerLens 3 is wrong about.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "d_mlp": ("LlamaForCausalLM", {"intermediate_size": 32}, 1),
    "d_vocab": ("LlamaForCausalLM", {"vocab_size": 32}, 1),
    "both": ("LlamaForCausalLM", _ALL_EQUAL, 2),
    "d_head": ("LlamaForCausalLM", {"num_attention_heads": 1, "num_key_value_heads": 1}, 0),
    "n_heads": ("LlamaForCausalLM", {"num_attention_heads": 8, "head_dim": 8}, 0),
    "biases": ("GPT2LMHeadModel", {"n_inner": 32, "vocab_size": 32}, 2),
    "parallel": ("GPTNeoXForCausalLM", _ALL_EQUAL, 2),
    "one norm": ("PhiForCausalLM", _ALL_EQUAL, 2),
    "value biases": ("Qwen2ForCausalLM", _ALL_EQUAL, 2),
    "experts": ("MixtralForCausalLM", {"intermediate_size": 32, "vocab_size": 32}, 1),
}
_STEPS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
IDS = torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def build(name: str, **more: Any) -> tuple[Path, torch.Tensor]:
        architecture, keywords, _ = CASES[name]
        config = make_config(architecture, **{**keywords, **more})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn_like(parameter)
                    parameter.copy_(0.3 * noise) if parameter.ndim > 1 else parameter.add_(
                        noise, alpha=0.2
                    )
        folder = tmp_path_factory.mktemp("square")
        model.save_pretrained(folder)
        with torch.no_grad():
            return folder, model(IDS).logits.log_softmax(-1)

    return build


def _log_probs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).float().log_softmax(-1)


def _notes(model: Any) -> int:
    return sum("for the other where" in note for note in model.load_report.notes)


@pytest.mark.parametrize("name", CASES)
def test_log_probs_are_those_of_transformers(name: str, folder_of: Any) -> None:
    if CASES[name][0] not in AVAILABLE:
        pytest.skip(f"no {CASES[name][0]} here")
    folder, wanted = folder_of(name)
    lean = lean_model(folder)
    assert (_log_probs(lean) - wanted).abs().max() < TOLERANCE
    assert _notes(lean) == (CASES[name][2] if GUESSES_SIDES else 0)
    if lean.load_report.processing["center_unembed"] == "done":
        assert lean.W_U.mean(-1).abs().max() < 1e-6

    raw = lean_model(folder, **reference.NO_PROCESSING)
    assert not _notes(raw)
    weights = {key: value.clone() for key, value in raw.state_dict().items()}
    raw.process_weights_()
    for key, parameter in raw.named_parameters():
        assert torch.allclose(parameter, lean.get_parameter(key), atol=1e-6), key

    load_weights_(raw, folder)
    assert (_log_probs(raw) - wanted).abs().max() < TOLERANCE
    if not REPLACES_NORMS:  # else TransformerLens leaves the model's own norms beside the folded
        other = lean_model(folder, **reference.NO_PROCESSING)
        other.load_and_process_state_dict(weights)
        assert (_log_probs(other) - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["biases", "both"])
def test_steps_by_themselves(name: str, folder_of: Any) -> None:
    folder, wanted = folder_of(name)
    for values in product((False, True), repeat=3):
        flags = dict(zip(("fold_ln", "center_unembed", "fold_value_biases"), values, strict=True))
        lean = lean_model(folder, center_writing_weights=values[0], **flags)
        assert (_log_probs(lean) - wanted).abs().max() < TOLERANCE, flags


def test_every_parameter_is_that_of_a_model_with_other_lengths(folder_of: Any) -> None:
    """One more hidden unit, which changes nothing else, makes stock right."""
    folder, _ = folder_of("both")
    raw = lean_model(folder, **reference.NO_PROCESSING)
    cfg = HookedTransformerConfig.from_dict(
        {**raw.cfg.to_dict(), "d_mlp": 65, "init_weights": False}
    )
    wider = LeanHookedTransformer(cfg)
    weights = dict(raw.state_dict())
    for name, value in weights.items():
        missing = [0] * value.dim() * 2
        if name.endswith(("W_in", "W_gate", "b_in")):
            missing[1] = 1
        elif name.endswith("W_out"):
            missing[3] = 1
        weights[name] = torch.nn.functional.pad(value, missing)
    wider.load_and_process_state_dict(weights)
    lean = lean_model(folder)
    for leaf in ("W_in", "W_gate"):
        ours = lean.get_parameter(f"blocks.0.mlp.{leaf}")
        assert torch.equal(wider.get_parameter(f"blocks.0.mlp.{leaf}")[:, :64], ours)


@pytest.mark.skipif(not GUESSES_SIDES, reason="version 2 processes in the model's own dtype")
def test_half_precision_is_rounded_once(folder_of: Any) -> None:
    folder, _ = folder_of("both")
    raw = lean_model(folder, dtype="bfloat16", **reference.NO_PROCESSING)
    folded = raw.W_U.float() * raw.ln_final.w.float()[:, None]
    wanted = (folded - folded.mean(-1, keepdim=True)).bfloat16()
    assert torch.equal(lean_model(folder, dtype="bfloat16").W_U, wanted)


@pytest.mark.parametrize("norm", ["LN", "RMS"])
@pytest.mark.parametrize("lengths", [(32, 20), (20, 32), (32, 32), (20, 24)])
def test_live_models_with_another_output_vocabulary(norm: str, lengths: tuple[int, int]) -> None:
    cfg = HookedTransformerConfig(
        n_layers=1,
        d_model=32,
        d_head=8,
        n_ctx=9,
        act_fn="gelu",
        normalization_type=norm,
        seed=1,
        device="cpu",
        d_vocab=lengths[0],
        d_vocab_out=lengths[1],
    )
    _unchanged(cfg)


def test_experts_behind_a_layer_norm() -> None:
    """TransformerLens drops the norm's bias, and centres the experts over the wrong side."""
    cfg = HookedTransformerConfig(
        n_layers=1,
        d_model=32,
        d_head=8,
        n_ctx=9,
        act_fn="gelu",
        normalization_type="LN",
        device="cpu",
        d_vocab=32,
        num_experts=3,
        experts_per_token=2,
        gated_mlp=True,
    )
    _unchanged(cfg)


def _unchanged(cfg: HookedTransformerConfig) -> None:
    model = LeanHookedTransformer(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    ids = torch.randint(cfg.d_vocab, (2, 9))
    with torch.no_grad():
        before = model(ids).log_softmax(-1)
        model.process_weights_()
        assert (model(ids).log_softmax(-1) - before).abs().max() < TOLERANCE
    assert model.W_U.mean(-1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_checkpoints(kind: str, folder_of: Any) -> None:
    folder, _ = folder_of("both")
    with torch.no_grad():
        wanted = quantized_model(folder, kind)(IDS).logits.log_softmax(-1)
    for flags in ({}, reference.NO_PROCESSING):
        lean = lean_model(saved(folder, kind), **flags)
        assert (_log_probs(lean) - wanted).abs().max() < 1e-3
