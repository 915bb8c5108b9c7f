"""The options that `plan`, `load` and `save` share: those of `from_pretrained_lean`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

QUANTIZATIONS = ("8bit", "nf4", "fp4")
"""What `quantize=` may say. The formats tell (a test compares), but take torch to import."""

_WHAT, _HOW, _WHERE = "What to load", "How to load it", "Where it is"


def _option(*names: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


Model = Annotated[
    str, typer.Argument(help="A folder, a TransformerLens name or alias, or any hub name.")
]


def json_option(what: str) -> Any:
    """`--json`: where to write something."""
    return typer.Option(
        help=f"Write {what} as JSON; - for standard output.", callback=_can_be_written
    )


def picture_option(help: str) -> Any:
    """An option that names a file to draw into."""
    return typer.Option(help=help, callback=_can_be_drawn)


def _can_be_written(path: Path | None) -> Path | None:
    """Say before a load of minutes, not after it, that there is nowhere to write."""
    if path is not None and str(path) != "-" and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.absolute().parent}.")
    return path


def _can_be_drawn(path: Path | None) -> Path | None:
    if path is not None:
        from tl_fastload.report.pictures.style import pictures

        pictures().check_format(path)
    return _can_be_written(path)


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _shared(
    *,
    dtype: Annotated[
        str | None,
        _option(
            panel=_WHAT,
            help="Of the parameters: float32, bfloat16 or float16. By default float32, or what a "
            "processed copy was saved in.",
            show_default=False,
        ),
    ] = None,
    processing: Annotated[
        bool,
        _option(
            "--processing/--no-processing",
            panel=_WHAT,
            help="TransformerLens' folding and centring, as from_pretrained does or as "
            "from_pretrained_no_processing does.",
        ),
    ] = True,
    skip: Annotated[
        list[str] | None,
        _option(
            metavar="STEP",
            panel=_WHAT,
            help="Leave out one step: fold_ln, center_writing_weights, center_unembed or "
            "fold_value_biases. May be repeated.",
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        _option(
            metavar="KIND",
            panel=_WHAT,
            help=f"One of {', '.join(QUANTIZATIONS)}, after processing.",
        ),
    ] = None,
    dequantize: Annotated[
        bool, _option("--dequantize", panel=_WHAT, help="Make a quantized checkpoint ordinary.")
    ] = False,
    adapter: Annotated[
        str | None,
        _option(metavar="LORA", panel=_WHAT, help="Merge this LoRA adapter: a folder or hub name."),
    ] = None,
    requantize: Annotated[
        bool,
        _option("--requantize", panel=_WHAT, help="Merge the adapter into quantized weights, too."),
    ] = False,
    check_base: Annotated[
        bool,
        _option(
            "--check-base/--no-check-base",
            panel=_WHAT,
            help="Refuse an adapter that names another base model, or go ahead.",
        ),
    ] = True,
    first_n_layers: Annotated[
        int | None, _option(metavar="N", panel=_WHAT, help="Load only that many layers.")
    ] = None,
    n_ctx: Annotated[
        int | None, _option(metavar="N", panel=_WHAT, help="Another context length.")
    ] = None,
    device: Annotated[
        str | None,
        _option(panel=_HOW, help="cpu, cuda, cuda:1 ...; by default CUDA if there is one."),
    ] = None,
    strategy: Annotated[str, _option(panel=_HOW, help="auto, assign or copy.")] = "auto",
    mmap: Annotated[
        bool | None,
        _option(
            "--mmap/--no-mmap",
            panel=_HOW,
            help="Map weights that need no change, or read everything. By default they are mapped "
            "on local disks.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        str | None,
        _option(
            panel=_HOW,
            help="Memory order of the parameters: forward, as the forward pass multiplies, or "
            "stock, row-major. By default forward, or what a processed copy was saved in.",
            show_default=False,
        ),
    ] = None,
    check_memory: Annotated[
        bool,
        _option(
            "--check-memory/--no-check-memory",
            panel=_HOW,
            help="Refuse a load that will not fit, or go ahead.",
        ),
    ] = True,
    revision: Annotated[
        str | None, _option(panel=_WHERE, help="Branch, tag or commit of a hub name.")
    ] = None,
    subfolder: Annotated[
        str | None, _option(panel=_WHERE, help="Where in the folder or repository it lies.")
    ] = None,
    offline: Annotated[
        bool, _option("--offline", panel=_WHERE, help="Use only files that are here already.")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        _option("--trust-remote-code", panel=_WHERE, help="Run code that comes with the model."),
    ] = False,
) -> None:
    """The shared options, declared once."""


_PASSED_IF_GIVEN = (
    "dtype",
    "layout",
    "adapter",
    "requantize",
    "revision",
    "subfolder",
    "local_files_only",
    "trust_remote_code",
)
_STEPS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained_lean` for what was given on the command line."""
    skipped = given.pop("skip") or []
    for step in skipped:
        if step not in _STEPS:
            raise typer.BadParameter(
                f"{step!r} is none of {', '.join(_STEPS)}.", param_hint="'--skip'"
            )
    processing = given.pop("processing")
    steps = {step: processing and step not in skipped for step in _STEPS}
    mmap = given.pop("mmap")
    arguments = {**given, **steps, "mmap": "auto" if mmap is None else mmap}
    arguments["local_files_only"] = arguments.pop("offline")
    # Left to the loader's own defaults unless they say something.
    for name in _PASSED_IF_GIVEN:
        if not arguments[name]:
            del arguments[name]
    return arguments


def takes_load_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the shared options; it finds what they mean in its argument `arguments`."""
    shared = inspect.signature(_shared, eval_str=True).parameters
    own = dict(inspect.signature(command, eval_str=True).parameters)
    del own["arguments"]

    @functools.wraps(command)
    def wrapped(**given: Any) -> Any:
        arguments = _arguments({name: given.pop(name) for name in shared})
        return command(arguments=arguments, **given)

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in (*own.values(), *shared.values())
    ]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    del wrapped.__wrapped__
    return wrapped
