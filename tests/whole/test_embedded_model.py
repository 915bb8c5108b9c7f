"""The embedded model: it is what its card says, and it really has induction heads."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file
from transformer_lens import HookedTransformer
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase

from demo.first_look import stock_model
from demo.induction import copy_losses, head_scores, repeated_tokens
from demo.toy_language import ADJECTIVES, END, FIRST_ORDINARY_ID, IDS, UNKNOWN, WORDS
from demo.train_embedded_model import Recipe, train
from tl_fastload import LeanHookedTransformer
from tl_fastload.embedded_model import embedded_model_path

FOLDER = embedded_model_path()


@pytest.fixture(scope="module")
def lean() -> HookedTransformer:
    return LeanHookedTransformer.from_pretrained_lean(FOLDER, device="cpu", progress=False)


@pytest.fixture(scope="module")
def stock(lean: HookedTransformer) -> HookedTransformer:
    return stock_model(lean, GPT2LMHeadModel.from_pretrained(FOLDER).eval())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture
def repeated() -> torch.Tensor:
    return repeated_tokens(FIRST_ORDINARY_ID, len(WORDS), IDS[END], seed=1)


def test_it_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 3_000_000


def test_a_head_after_the_first_layer_is_an_induction_head(
    stock: HookedTransformer, repeated: torch.Tensor
) -> None:
    later = [score.induction for score in head_scores(stock, repeated) if score.layer >= 1]
    assert max(later) > 0.5


def test_a_previous_token_head_feeds_it(stock: HookedTransformer, repeated: torch.Tensor) -> None:
    first = [score.previous_token for score in head_scores(stock, repeated) if score.layer == 0]
    assert max(first) > 0.5


def test_induction_follows_the_words_not_the_positions(stock: HookedTransformer) -> None:
    tokens = repeated_tokens(FIRST_ORDINARY_ID, len(WORDS), IDS[END])
    tokens[:, 51:] = repeated_tokens(FIRST_ORDINARY_ID, len(WORDS), IDS[END], seed=2)[:, 51:]
    assert max(score.induction for score in head_scores(stock, tokens)) < 0.1


def test_it_copies_what_it_has_seen(stock: HookedTransformer, repeated: torch.Tensor) -> None:
    first, second = copy_losses(stock, repeated)
    assert first > 5.0  # nothing to go by: at best the logarithm of the vocabulary, 5.4
    assert second < 0.5


def test_it_knows_its_language(lean: HookedTransformer) -> None:
    logits = lean("the cat is")
    likely = {WORDS[index] for index in logits[0, -1].topk(5).indices.tolist()}
    assert likely <= set(ADJECTIVES)


def test_every_bias_and_norm_was_learnt() -> None:
    for name, tensor in load_file(FOLDER / "model.safetensors").items():
        assert tensor.std() > 1e-3, name
        assert tensor.abs().mean() > 1e-3, name


def test_the_tokenizer_reads_words(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("The quiet fox sleeps.")["input_ids"] == [
        IDS[word] for word in ("the", "quiet", "fox", "sleeps", ".")
    ]
    assert tokenizer("zebra")["input_ids"] == [IDS[UNKNOWN]]
    assert len(tokenizer) == len(WORDS)


def test_the_lean_model_takes_text(lean: HookedTransformer) -> None:
    assert lean.to_tokens("the fox").tolist() == [[IDS[END], IDS["the"], IDS["fox"]]]
    assert lean.to_string(lean.to_tokens("the fox", prepend_bos=False)) == ["the fox"]


def test_the_lean_model_is_the_stock_model(
    lean: HookedTransformer, stock: HookedTransformer, repeated: torch.Tensor
) -> None:
    theirs = dict(stock.named_parameters())
    for name, parameter in lean.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    assert torch.allclose(lean(repeated), stock(repeated), atol=1e-5, rtol=0)


def test_the_weights_are_of_the_recipe_in_the_script() -> None:
    card = json.loads((FOLDER / "training.json").read_text())
    assert card["recipe"] == asdict(Recipe())


def test_training_is_deterministic() -> None:
    recipe = replace(Recipe(), steps=3, warm_up_steps=1, short_row_steps=2, tokens_per_batch=512)
    one, other = train(recipe)[0].state_dict(), train(recipe)[0].state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    another = train(replace(recipe, seed=recipe.seed + 1))[0].state_dict()
    assert not all(torch.equal(tensor, another[name]) for name, tensor in one.items())
