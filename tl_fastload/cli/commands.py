"""`tl-fastload plan`, `load` and `save`, which are about one model, and `doctor`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tl_fastload.cli.bench.synthetic import Shape, checked_model, hf_config
from tl_fastload.cli.console import console, draw, give, libraries_to_stderr, show_rows
from tl_fastload.cli.options import MODEL_HELP, Drawn, Model, Written, command, lean_class
from tl_fastload.errors import CheckpointError
from tl_fastload.ground.words import format_bytes


@command
def plan(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    *,
    arguments: dict[str, Any],
    shape: str | None = None,
    json: Written = None,
    plot: Drawn = None,
) -> None:
    """Tell what loading would take and whether it fits, from headers alone, or from config.json
    where there are no weights.

    Exits with 1 if the model does not fit.

    [bold]Examples[/]

      tl-fastload plan gpt2-xl

      tl-fastload plan gpt2-xl --quantize nf4 --plot plan.png

      tl-fastload plan --shape llama:d_model=512,n_layers=8,dtype=bfloat16 --dtype bfloat16

    Args:
        shape: Plan a model of this shape instead: gpt2 or llama, then any of n_layers, d_model,
            n_heads, n_kv_heads, d_mlp, d_vocab, n_ctx and dtype (of the file).
        json: Write the plan as JSON; - for standard output.
        plot: Draw the plan into this file (.png, .pdf ...).
    """
    what = checked_model(model, shape)
    with libraries_to_stderr():
        planned: Any = what
        if isinstance(what, Shape):
            from transformers import AutoConfig

            planned = AutoConfig.for_model(**hf_config(what))
        found = lean_class(model or "", arguments).plan(planned, **arguments)
        found = found if shape is None else replace(found, source=shape)
    give(json, found.to_dict, lambda: show_rows(found))
    draw(plot, found.plot)
    if not found.fits:
        raise typer.Exit(1)


@command
def load(
    model: Model,
    arguments: dict[str, Any],
    prompt: str | None = None,
    top: Annotated[int, typer.Option(min=1)] = 5,
    json: Written = None,
    plot: Drawn = None,
    map: Drawn = None,
    cache: bool | None = None,
) -> None:
    """Load a model and print the report: time, memory, processing.

    [bold]Examples[/]

      tl-fastload load gpt2 --prompt "The capital of France is"

      tl-fastload load ./my-model --dtype bfloat16 --no-processing

      tl-fastload load gpt2-xl --quantize nf4 --plot memory.png --map layers.png

    Args:
        prompt: Show the likeliest next tokens after this text.
        top: How many tokens --prompt shows.
        json: Write the report as JSON; - for standard output.
        plot: Draw memory over time into this file (.png, .pdf ...).
        map: Draw where the memory of each layer lies into this file.
        cache: Keep a processed copy and map it the next time. By default as TL_FASTLOAD_CACHE says.
    """
    from tl_fastload.plots import plot_memory_map

    with libraries_to_stderr():
        loaded = lean_class(model, arguments).from_pretrained_lean(model, cache=cache, **arguments)
        predicted = None if prompt is None else _predictions(loaded, prompt, top)
    report = loaded.load_report

    def show() -> None:
        show_rows(report)
        if predicted is not None:
            _show_predictions(predicted)

    give(json, lambda: {"report": report.to_dict(), "predictions": predicted}, show)
    draw(plot, report.plot)
    draw(map, partial(plot_memory_map, loaded))


def _predictions(model: Any, prompt: str, top: int) -> list[dict[str, Any]]:
    """The likeliest next tokens, their probabilities and ids."""
    import torch

    if model.tokenizer is None:
        raise CheckpointError(
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


@command
def save(
    model: Model,
    folder: Annotated[Path, typer.Argument()],
    arguments: dict[str, Any],
    push: Annotated[str | None, typer.Option(metavar="REPOSITORY")] = None,
    private: bool | None = None,
) -> None:
    """Load a model and save it, processed and quantized as asked, for loading in an instant.

    The copy is written whole or not at all.

    [bold]Examples[/]

      tl-fastload save gpt2-xl ./gpt2-xl-processed --dtype bfloat16

      tl-fastload save ./my-model ./my-model-nf4 --quantize nf4

      tl-fastload load ./gpt2-xl-processed

      tl-fastload save gpt2-xl ./gpt2-xl-processed --push me/gpt2-xl-processed

    Args:
        folder: Where to write the copy: a new or empty folder, or that of an older copy, which is
            replaced.
        push: Push the copy to this repository on the hub as well.
        private: Whether a repository that --push makes is private. By default as its owner has it.
    """
    from tl_fastload.copies.to_hub import push_copy
    from tl_fastload.copies.write import check_target

    check_target(folder)
    with libraries_to_stderr():
        loaded = lean_class(model, arguments).from_pretrained_lean(model, **arguments)
        written = loaded.save_lean(folder)
    size_bytes = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    console().print(Text(f"Saved {loaded.load_report.source} in {written}"))
    console().print(Text(f"{format_bytes(size_bytes)}; load it with: tl-fastload load {written}"))
    if push is not None:
        with libraries_to_stderr():
            commit = push_copy(folder, push, private=private)
        console().print(Text(f"Pushed: {commit.commit_url}"))


@command
def doctor(json: Written = None) -> None:
    """Show versions, devices, kernels, caches and memory limits, and what to fix.

    Multiplies by a small matrix of each quantized format, so that "works" means that it does.

    [bold]Examples[/]

      tl-fastload doctor

      tl-fastload doctor --json facts.json

    Args:
        json: Write the facts as JSON; - for standard output.
    """
    from tl_fastload.cli.diagnosis import diagnose

    found = diagnose()

    def show() -> None:
        show_rows(found)
        out = console()
        out.print("\n[bold]To fix[/]" if found.fixes else "\n[green]Nothing to fix.[/]")
        for fix in found.fixes:
            out.print(Text(f"- {fix}"))

    give(json, found.to_dict, show)
