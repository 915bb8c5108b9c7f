"""`tl-fastload load`: load a model, print its report, and what it predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tl_fastload.cli.console import console, libraries_to_stderr, say, show_rows, write_json
from tl_fastload.cli.options import Debug, Model, json_option, picture_option
from tl_fastload.errors import ArgumentError


def load(
    model: Model,
    arguments: dict[str, Any],
    prompt: Annotated[
        str | None, typer.Option(help="Show the likeliest next tokens after this text.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many tokens --prompt shows.")] = 5,
    json: Annotated[Path | None, json_option("the report")] = None,
    plot: Annotated[
        Path | None, picture_option("Draw memory over time into this file (.png, .pdf ...).")
    ] = None,
    map: Annotated[
        Path | None, picture_option("Draw where the memory of each layer lies into this file.")
    ] = None,
    cache: Annotated[
        bool | None,
        typer.Option(
            "--cache/--no-cache",
            help="Keep a processed copy and map it the next time. By default as "
            "TL_FASTLOAD_CACHE says.",
            show_default=False,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Load a model and print the report: time, memory, processing.

    [bold]Examples[/]

      tl-fastload load gpt2 --prompt "The capital of France is"

      tl-fastload load ./my-model --dtype bfloat16 --no-processing

      tl-fastload load gpt2-xl --quantize nf4 --plot memory.png --map layers.png
    """
    from tl_fastload.model import LeanHookedTransformer

    with libraries_to_stderr():
        loaded = LeanHookedTransformer.from_pretrained_lean(model, cache=cache, **arguments)
        predicted = None if prompt is None else _predictions(loaded, prompt, top)
    if str(json) != "-":
        show_rows(loaded.load_report)
    if json is not None:
        write_json({"report": loaded.load_report.to_dict(), "predictions": predicted}, json)
    if predicted is not None and str(json) != "-":
        _show_predictions(predicted)
    if plot is not None:
        loaded.load_report.plot(path=plot)
        say(f"Written: {plot}")
    if map is not None:
        from tl_fastload.plots import plot_memory_map

        plot_memory_map(loaded, map)
        say(f"Written: {map}")


def _predictions(model: Any, prompt: str, top: int) -> list[dict[str, Any]]:
    """The likeliest next tokens, their probabilities and ids."""
    import torch

    if model.tokenizer is None:
        raise ArgumentError(
            "--prompt needs a tokenizer, and none lies with the model. Put its tokenizer files "
            "(tokenizer.json ...) beside config.json."
        )
    with torch.inference_mode():
        logits = model(prompt, return_type="logits")[0, -1].float()
    probabilities = torch.softmax(logits[: model.cfg.d_vocab], -1)
    found = torch.topk(probabilities, min(top, len(probabilities)))
    return [
        {"token": model.tokenizer.decode([index]), "id": index, "probability": probability}
        for probability, index in zip(found.values.tolist(), found.indices.tolist(), strict=True)
    ]


def _show_predictions(predicted: list[dict[str, Any]]) -> None:
    table = Table(title="Next token", title_justify="left")
    table.add_column("token")
    table.add_column("probability", justify="right")
    table.add_column("id", justify="right")
    for one in predicted:
        table.add_row(Text(repr(one["token"])), f"{one['probability']:.3f}", str(one["id"]))
    console().print(table)
