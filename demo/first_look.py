"""The first half of the demo: the embedded model, its load report and its induction heads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import GPT2LMHeadModel
from transformers import logging as transformers_logging

from demo.induction import copy_losses, head_scores, repeated_tokens
from demo.toy_language import END, FIRST_ORDINARY_ID, IDS
from tl_fastload.embedded_model import embedded_model_path
from tl_fastload.faces import lean_class
from tl_fastload.ground.compat import TRANSFORMER_LENS

PROMPTS = (
    "the hungry",  # the toy language decides
    "moon alice slowly hat river with bob , moon alice slowly hat river with",  # no grammar helps
)
INDUCTION_SCORE = 0.5  # more than half of a head's attention, on average


def show(console: Console, road: str | None = None) -> None:
    """Load the embedded model lean and print what it is and does.

    Args:
        console: where to print.
        road: "hooked" or "bridge"; by default the first that the installed TransformerLens has.
    """
    folder, lean = embedded_model_path(), lean_class(road)
    console.print(f"{lean.__name__} (TransformerLens {TRANSFORMER_LENS})", highlight=False)
    model = lean.from_pretrained_lean(folder, device="cpu")
    console.print(str(model.load_report), highlight=False)
    console.print()
    tokens = repeated_tokens(FIRST_ORDINARY_ID, model.cfg.d_vocab, IDS[END])
    console.print(_heads_table(model, tokens))
    first, second = copy_losses(model, tokens)
    console.print(
        f"Loss on random words, seen first: {first:.2f} nats; on their copy: {second:.2f}"
    )
    for prompt in PROMPTS:
        console.print(f"{prompt} -> [bold]{_next_word(model, prompt)}[/]")
    console.print()
    console.print(_equality_table(model, folder, tokens))


def _heads_table(model: Any, tokens: torch.Tensor) -> Table:
    table = Table(title="Heads on 50 random words said twice: share of attention", title_style="")
    for column in ("head", "to the previous word", "induction", ""):
        table.add_column(column, justify="left" if column in ("head", "") else "right")
    for score in head_scores(model, tokens):
        remark = "[green]induction head[/]" if score.induction > INDUCTION_SCORE else ""
        if score.previous_token > INDUCTION_SCORE:
            remark = "[cyan]previous-token head[/]"
        table.add_row(score.name, f"{score.previous_token:.2f}", f"{score.induction:.2f}", remark)
    return table


def _next_word(model: Any, prompt: str) -> str:
    with torch.inference_mode():
        logits: Any = model(prompt)
    word: str = model.to_single_str_token(int(logits[0, -1].argmax()))
    return word


def _equality_table(model: Any, folder: Path, tokens: torch.Tensor) -> Table:
    """How far the lean model is from stock TransformerLens, and from transformers itself."""
    transformers_logging.disable_progress_bar()
    hf_model = GPT2LMHeadModel.from_pretrained(folder).eval()
    is_bridge = hasattr(model, "original_model")
    stock = stock_bridge(folder) if is_bridge else stock_model(model, hf_model)
    theirs = dict(stock.named_parameters())
    with torch.inference_mode():
        lean_logits, stock_logits = model(tokens), stock(tokens)
        hf_logits = hf_model(tokens).logits
    parameters = max(_distance(p, theirs[name]) for name, p in model.named_parameters())
    # Centring moves logits by a constant, so only log-probabilities compare with transformers'.
    log_probs = _distance(lean_logits.log_softmax(-1), hf_logits.log_softmax(-1))
    table = Table(title="Largest difference of the lean model", title_style="")
    table.add_column("from")
    table.add_column("of", justify="left")
    table.add_column("", justify="right")
    table.add_row("stock TransformerLens", "any parameter", f"{parameters:.1e}")
    table.add_row(
        "stock TransformerLens", "any logit", f"{_distance(lean_logits, stock_logits):.1e}"
    )
    table.add_row("transformers", "any log-probability", f"{log_probs:.1e}")
    return table


def stock_model(like: Any, hf_model: GPT2LMHeadModel) -> Any:
    """What TransformerLens' own classes, converter and processing make of the same weights.

    Args:
        like: a processed HookedTransformer, for the shape.
        hf_model: the weights.
    """
    from transformer_lens import HookedTransformer
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    config = copy.deepcopy(like.cfg)
    config.normalization_type = "LN"  # as before the processing
    stock = HookedTransformer(config, like.tokenizer)
    stock.load_and_process_state_dict(convert_gpt2_weights(hf_model, config))
    return stock.eval()


def stock_bridge(folder: Path) -> Any:
    """The bridge that TransformerLens itself boots and processes."""
    from transformer_lens.model_bridge import TransformerBridge

    stock = TransformerBridge.boot_transformers(str(folder), device="cpu")
    stock.enable_compatibility_mode(disable_warnings=True)
    return stock.eval()


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()
