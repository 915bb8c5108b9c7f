"""The test bed itself: every case builds, is awkward enough, and stock agrees with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig

from tests.support import reference, zoo_raw
from tests.support import zoo as bed
from tests.support.zoo import CASES

HF_CASES = [name for name, case in CASES.items() if case.kind == "hf"]
PTH_CASES = [name for name, case in CASES.items() if case.kind == "pth"]
TOLERANCE = 1e-4
# Tensors that no training touches: stale buffers of old repositories.
BUFFERS = (".attn.bias", ".attention.bias", "masked_bias", "inv_freq", ".attn.mask")


def forward(model: Any, case_id: str) -> torch.Tensor:
    with torch.no_grad():
        return reference.log_probs(model(bed.tokens(case_id)))


def test_every_architecture_is_there() -> None:
    expected = """GPT2LMHeadModel GPTNeoForCausalLM OPTForCausalLM GPTJForCausalLM
        GPTNeoXForCausalLM LlamaForCausalLM MistralForCausalLM MixtralForCausalLM BloomForCausalLM
        QWenLMHeadModel Qwen2ForCausalLM Qwen3ForCausalLM PhiForCausalLM Phi3ForCausalLM
        GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration
        OlmoForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoeForCausalLM ApertusForCausalLM
        GptOssForCausalLM GPT2LMHeadCustomModel neel neel-solu-old mingpt"""
    assert {case.architecture for case in CASES.values()} == set(expected.split())


@pytest.mark.parametrize("case_id", CASES)
def test_no_weight_is_trivial(case_id: str, zoo: Any) -> None:
    folder = zoo(case_id)
    tensors = bed.read_weights(folder)
    trained = {
        name: value
        for name, value in tensors.items()
        if value.numel() > 1 and not name.endswith(BUFFERS)
    }
    assert trained
    for name, value in trained.items():
        assert value.isfinite().all(), name
        assert value.float().std() > 0.05, name
        assert (value != 0).all(), name
        assert (value != 1).all(), name


@pytest.mark.parametrize("case_id", CASES)
def test_norms_and_biases_matter(case_id: str, zoo: Any) -> None:
    """A norm or bias of the first block or the end that were lost would move the log-probs."""
    folder = zoo(case_id)
    model = reference.stock_model(case_id, folder, device="cpu", **reference.NO_PROCESSING)
    expected = forward(model, case_id)
    seen = 0
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        is_norm = leaf == "w" and ("ln" in name or "norm" in name)
        # Softmax does not see a key bias that is not rotated.
        is_bias = leaf in ("b", "bias") or (leaf.startswith("b_") and leaf != "b_K")
        if not (is_norm or is_bias) or "blocks.1" in name or "blocks.2" in name:
            continue
        neutral = torch.ones_like(parameter) if is_norm else torch.zeros_like(parameter)
        if torch.equal(parameter, neutral):
            continue
        kept, parameter.data = parameter.data, neutral
        moved = (forward(model, case_id) - expected).abs().max()
        parameter.data = kept
        assert moved > 10 * TOLERANCE, name
        seen += 1
    assert seen or CASES[case_id].architecture == "OlmoForCausalLM"  # norms without weights


@pytest.mark.parametrize("case_id", ["gpt2", "gpt2-hub", "mixtral", "qwen", "solu", "othello"])
def test_a_case_is_the_same_every_time(case_id: str, zoo: Any, tmp_path: Path) -> None:
    first, second = zoo(case_id), bed.build(case_id, tmp_path / "again")
    assert json.loads((first / "config.json").read_text()) == json.loads(
        (second / "config.json").read_text()
    )
    expected, actual = bed.read_weights(first), bed.read_weights(second)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


def test_cases_differ_in_their_weights(zoo: Any) -> None:
    plain, untied = bed.read_weights(zoo("neox")), bed.read_weights(zoo("neox-sequential"))
    assert not torch.equal(plain["embed_out.weight"], untied["embed_out.weight"])


# That stock agrees with transformers follows from two tests: we agree with stock (test_parity.py)
# and with transformers (test_hf_log_probs.py), processed and not. These have only stock.
@pytest.mark.parametrize("case_id", [name for name in CASES if name not in HF_CASES])
def test_stock_processing_changes_weights_and_not_the_function(case_id: str, zoo: Any) -> None:
    folder = zoo(case_id)
    raw = reference.stock_model(case_id, folder, device="cpu", **reference.NO_PROCESSING)
    processed = reference.stock_model(case_id, folder, device="cpu")
    assert (forward(raw, case_id) - forward(processed, case_id)).abs().max() < TOLERANCE
    before, after = raw.state_dict(), processed.state_dict()
    changed = [name for name in after if not torch.equal(before[name], after[name])]
    if case_id != "shortformer":  # stock folds nothing but the value biases there
        assert changed


@pytest.mark.parametrize("wrong", reference.STOCK_WRONG, ids=lambda wrong: wrong.case_id)
def test_stock_is_wrong_where_the_table_says_so(wrong: reference.StockWrong, zoo: Any) -> None:
    folder = zoo(wrong.case_id, **wrong.overrides)
    expected = reference.hf_log_probs(wrong.case_id, folder, bed.tokens(wrong.case_id))
    flags = {**reference.NO_PROCESSING, **wrong.flags}
    stock = reference.stock_model(wrong.case_id, folder, device="cpu", **flags)
    off_by = (forward(stock, wrong.case_id) - expected).abs().max().item()
    assert off_by == pytest.approx(wrong.off_by, rel=0.2)


SKIP_FLAGS = {
    "forward in another dtype than float32": {"dtype": torch.bfloat16},
    "smaller n_ctx": {"n_ctx": bed.SEQUENCE_LENGTH},
    "first_n_layers": {"first_n_layers": 1},
}


@pytest.mark.parametrize("what", reference.STOCK_SKIPS)
def test_stock_cannot_what_the_table_says(what: str, zoo: Any) -> None:
    """What it can, the tests that compare with it need."""
    for case_id in reference.STOCK_SKIPS[what]:
        folder = zoo(case_id)
        with pytest.raises(RuntimeError):
            forward(
                reference.stock_model(case_id, folder, device="cpu", **SKIP_FLAGS[what]), case_id
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa1-tied", "gemma2", "qwen", "othello"])
def test_dtypes(case_id: str, dtype: torch.dtype, zoo: Any) -> None:
    folder = zoo(case_id, dtype=dtype)
    floats = [value for value in bed.read_weights(folder).values() if value.is_floating_point()]
    assert {value.dtype for value in floats} == {dtype}
    stock = reference.stock_model(case_id, folder, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in stock.parameters()} == {dtype}


@pytest.mark.parametrize("bin", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("case_id", ["gpt2", "gpt2-hub", "llama-gqa1-tied", "mixtral", "qwen"])
def test_layouts_hold_the_same_weights(case_id: str, bin: bool, zoo: Any) -> None:
    single, sharded = zoo(case_id, bin=bin), zoo(case_id, bin=bin, shards=True)
    index = json.loads(next(sharded.glob("*.index.json")).read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert index["weight_map"].keys() == bed.read_weights(single).keys()
    expected = forward(reference.stock_model(case_id, zoo(case_id), device="cpu"), case_id)
    for folder in (single, sharded):
        stock = reference.stock_model(case_id, folder, device="cpu")
        assert torch.equal(forward(stock, case_id), expected)


def test_bin_stores_tied_weights_twice(zoo: Any) -> None:
    tensors = bed.read_weights(zoo("llama-gqa1-tied", bin=True))
    tied = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    assert "lm_head.weight" not in bed.read_weights(zoo("llama-gqa1-tied"))


def test_overrides_reach_the_config_and_the_weights(zoo: Any) -> None:
    folder = zoo("llama", tie_word_embeddings=True, vocab_size=67)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 67
    assert bed.read_weights(folder)["model.embed_tokens.weight"].shape == (67, 30)


@pytest.mark.parametrize("case_id", PTH_CASES)
def test_training_checkpoints_resolve_in_stock(case_id: str, zoo: Any) -> None:
    folder = zoo(case_id)
    if not CASES[case_id].repo.startswith("NeelNanda/"):
        with pytest.raises(ValueError, match="not checkpointed"):
            reference.stock_model(case_id, folder, checkpoint_index=1)
        return
    early = reference.stock_model(case_id, folder, device="cpu", checkpoint_index=1)
    by_value = reference.stock_model(
        case_id, folder, device="cpu", checkpoint_value=zoo_raw.TRAINING_TOKENS[1]
    )
    final = reference.stock_model(case_id, folder, device="cpu")
    assert early.cfg.checkpoint_value == zoo_raw.TRAINING_TOKENS[1]
    assert torch.equal(early.W_E, by_value.W_E)
    assert not torch.equal(early.W_E, final.W_E)


@pytest.mark.parametrize("case_id", ["gpt2", "qwen"])
def test_stock_takes_an_hf_model(case_id: str, zoo: Any) -> None:
    folder = zoo(case_id)
    source = reference.hf_model(case_id, folder) or reference.raw_module(folder, torch.float32)
    given = reference.stock_model(case_id, folder, device="cpu", hf_model=source)
    loaded = reference.stock_model(case_id, folder, device="cpu")
    assert torch.equal(forward(given, case_id), forward(loaded, case_id))


def test_hub_cache_serves_revisions_offline(zoo: Any, tmp_path: Path) -> None:
    repo, main, early = CASES["gpt2"].repo, zoo("gpt2"), zoo("gpt2", n_layer=1)
    cache = bed.hub_cache(tmp_path, repo, main, revisions={"main": None, "step1": early})
    options = {"cache_dir": cache, "local_files_only": True}
    assert AutoConfig.from_pretrained(repo, **options).n_layer == 2
    assert AutoConfig.from_pretrained(repo, revision="step1", **options).n_layer == 1
    path = Path(hf_hub_download(repo, "model.safetensors", **options))
    assert path.is_symlink()
    assert path.read_bytes() == (main / "model.safetensors").read_bytes()


def test_hub_cache_keeps_subfolders(zoo: Any, tmp_path: Path) -> None:
    repo = CASES["solu"].repo
    cache = bed.hub_cache(tmp_path, repo, zoo("solu"))
    name = f"checkpoints/model_{zoo_raw.TRAINING_TOKENS[1]:012d}.pth"
    path = hf_hub_download(repo, name, cache_dir=cache, local_files_only=True)
    assert torch.load(path, weights_only=True)["embed.W_E"].shape == (101, 30)


def test_a_tokenizer_can_lie_beside_the_weights(zoo: Any) -> None:
    folder = zoo("llama-gqa", tokenizer=True)
    stock = reference.stock_model("llama-gqa", folder, device="cpu")
    assert stock.to_tokens("w3 w100", prepend_bos=False).tolist() == [[3, 100]]


def test_tokens_are_deterministic_and_longer_than_any_window() -> None:
    for case_id, case in CASES.items():
        tokens = bed.tokens(case_id)
        assert torch.equal(tokens, bed.tokens(case))
        assert tokens.shape == (2, bed.SEQUENCE_LENGTH)
        assert tokens.max() < case.d_vocab
