"""Train the embedded model: a two-layer GPT-2 with real induction heads, in minutes on two cores.

Run from the repository: `python -m demo.train_embedded_model` (or `make embedded-model`).

Recipe, all of it here and seeded:

- data: `demo/toy_language.py`. Half of the rows are copies of one segment of random words with
  random words between them; a quarter is running text that quotes a passage of itself; a quarter
  is running text. Each row starts with the end-of-text token, which is also the BOS token. The
  copies lie at random distances: in strictly periodic rows the model finds a shortcut through
  the positions, and grows no induction heads.
- model: transformers' `GPT2LMHeadModel`, 2 layers, d_model 128, 4 heads, context 128, tied
  embeddings, no dropout.
- training: AdamW, linear warm-up, cosine decay; next-token loss wherever the next token can be
  known (not on fresh random words). Rows of 64 tokens first, where copying is learnt soonest,
  then of 128.

The result is an ordinary Hugging Face folder (config.json, model.safetensors, tokenizer.json).
One machine gives the same bytes every time; another processor or torch may round differently.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from demo.toy_language import END, FIRST_ORDINARY_ID, IDS, UNKNOWN, WORDS, ToyLanguage
from tl_fastload.embedded_model import embedded_model_path

CONTEXT = 128
IGNORED = -100  # cross_entropy's default `ignore_index`


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    seed: int = 20
    steps: int = 3000
    short_row_steps: int = 1000
    short_row_tokens: int = 64
    tokens_per_batch: int = 2048
    peak_learning_rate: float = 2e-3
    warm_up_steps: int = 50
    weight_decay: float = 0.05
    initializer_range: float = 0.06
    shortest_segment: int = 4
    longest_gap: int = 12
    threads: int = 2

    def row_tokens(self, step: int) -> int:
        return self.short_row_tokens if step <= self.short_row_steps else CONTEXT


Row = tuple[list[int], list[bool]]  # token ids, and whether each can be known from those before


class Rows:
    """Training rows and their labels."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._language = ToyLanguage(recipe.seed)
        self._random = random.Random(recipe.seed)

    def batch(self, row_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids `[rows, row_tokens]`, and the next ones `[rows, row_tokens - 1]` to learn."""
        kinds = [self._copies, self._copies, self._quoting_text, self._text]
        count = self._recipe.tokens_per_batch // row_tokens
        rows = [kinds[row % 4](row_tokens - 1) for row in range(count)]
        tokens = torch.tensor([[IDS[END], *words] for words, _ in rows])
        known = torch.tensor([known for _, known in rows])
        return tokens, torch.where(known, tokens[:, 1:], IGNORED)

    def _copies(self, length: int) -> Row:
        size = self._random.randint(self._recipe.shortest_segment, length // 2 - 1)
        segment = self._words(size)
        words, known = list(segment), [False] * size
        while len(words) < length:
            gap = self._random.randint(0, self._recipe.longest_gap)
            words += self._words(gap) + segment
            known += [False] * (gap + 1) + [True] * (size - 1)
        return words[:length], known[:length]

    def _quoting_text(self, length: int) -> Row:
        size = self._random.randint(length // 8, length // 3)
        text = self._language.passage(length - size)
        start = self._random.randint(0, len(text) - size)
        insert_at = self._random.randint(start + size, len(text))
        words = text[:insert_at] + text[start : start + size] + text[insert_at:]
        return words, [True] * length

    def _text(self, length: int) -> Row:
        return self._language.passage(length), [True] * length

    def _words(self, count: int) -> list[int]:
        return self._random.choices(range(FIRST_ORDINARY_ID, len(WORDS)), k=count)


def new_model(recipe: Recipe) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(WORDS),
            n_positions=CONTEXT,
            n_embd=128,
            n_layer=2,
            n_head=4,
            initializer_range=recipe.initializer_range,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=IDS[END],
            eos_token_id=IDS[END],
        )
    )


def train(recipe: Recipe) -> tuple[GPT2LMHeadModel, float]:
    """The trained model, and its mean loss (nats a token) over the last hundred steps."""
    torch.manual_seed(recipe.seed)
    model = new_model(recipe).train()
    rows = Rows(recipe)
    optimizer, schedule = optimizer_for(model, recipe)
    recent: list[float] = []
    started = time.perf_counter()
    for step in range(1, recipe.steps + 1):
        tokens, labels = rows.batch(recipe.row_tokens(step))
        logits = model(tokens).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = [*recent[-99:], loss.item()]
        if step % 100 == 0:
            mean = sum(recent) / len(recent)
            copying = second_half_loss(model)
            seconds = time.perf_counter() - started
            print(f"step {step:5d}  loss {mean:.3f}  second half {copying:.3f}  {seconds:.0f} s")
    return model.eval(), sum(recent) / len(recent)


def optimizer_for(
    model: GPT2LMHeadModel, recipe: Recipe
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW that decays matrices only, and its warm-up and cosine schedule."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, betas=(0.9, 0.98))

    def factor(step: int) -> float:
        if step < recipe.warm_up_steps:
            return (step + 1) / recipe.warm_up_steps
        done = (step - recipe.warm_up_steps) / (recipe.steps - recipe.warm_up_steps)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def second_half_loss(model: GPT2LMHeadModel, period: int = 50, rows: int = 16) -> float:
    """Loss (nats) on the second copy of `period` random words: near zero once the model copies."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(FIRST_ORDINARY_ID, len(WORDS), (rows, period), generator=generator)
    tokens = torch.cat([torch.full((rows, 1), IDS[END]), half, half], dim=1)
    logits = model(tokens).logits[:, period + 1 : -1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, period + 2 :].flatten()).item()


def save_tokenizer(folder: Path) -> None:
    """One token a word: lower case, split at spaces and punctuation."""
    tokenizer = Tokenizer(models.WordLevel(dict(IDS), unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([END, UNKNOWN])
    tokenizer.save(str(folder / "tokenizer.json"))
    # Written by hand: transformers 5 would name a class here that 4 does not have.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "unk_token": UNKNOWN,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, default=embedded_model_path(), help="folder to write")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimizer steps")
    arguments = parser.parse_args()
    recipe = Recipe(steps=arguments.steps)
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)

    model, loss = train(recipe)
    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.out)
    save_tokenizer(arguments.out)
    write_json(
        arguments.out / "training.json",
        {
            "recipe": asdict(recipe),
            "data": "demo/toy_language.py",
            "torch": torch.__version__,
            "final_loss": round(loss, 4),
            "second_half_loss": round(second_half_loss(model), 4),
        },
    )
    print(f"saved {arguments.out}")


if __name__ == "__main__":
    main()
