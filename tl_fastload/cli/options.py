"""Commands made of functions: their docstrings say what each option means.

`plan`, `load` and `save` share the options of `from_pretrained_lean`.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from tl_fastload.request.steps import STEPS

QUANTIZATIONS = ("8bit", "nf4", "fp4")
"""What `quantize=` may say. The formats tell (a test compares), but take torch to import."""
ROADS = ("hooked", "bridge")
"""What `--road` may say. `tl_fastload.faces` tells (a test compares), but takes torch to import."""
# The last of them is no part of the processing that is on by default.
_STEPS = STEPS[:-1]

# Not in a path, nor in what --shape says.
_ARGUMENT = re.compile(r"(?<![\w,:/-])([a-z_]\w*)=(\"[^\"]*\"|'[^']*'|[\w.:/*+-]*\w)?")
_SEPARATED = re.compile(r"(--[a-z-]+(?: [\w.:/*+-]+)?), (?=--)")
_CLASS = re.compile(r"tl_fastload\.Lean(?:(HookedTransformer)|TransformerBridge)")
_RAW_WAY = re.compile(
    r"(?:\w+\.)?(?:from_pretrained_no_processing|boot_transformers)_lean(?: \(then [^.,]*\))?"
)
_SECTION = re.compile(r"^(\w[\w ]*):\n((?: +.*\n?)+)", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


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


MODEL_HELP = "A folder, a GGUF file, a TransformerLens name or alias, or any hub name."
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Written = Annotated[Path | None, typer.Option(callback=_can_be_written)]
"""A file to write, or "-" for standard output."""
Drawn = Annotated[Path | None, typer.Option(callback=_can_be_drawn)]
"""A file to draw into."""


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_Number = Annotated[int | None, typer.Option(metavar="N")]


def _always(*, debug: Debug = False) -> None:
    """The option of every command; what shows errors looks for it itself."""


def _shared(
    *,
    road: Annotated[str | None, typer.Option(metavar="ROAD")] = None,
    dtype: str | None = None,
    processing: bool = True,
    skip: Annotated[list[str] | None, typer.Option(metavar="STEP")] = None,
    quantize: Annotated[str | None, typer.Option(metavar="KIND")] = None,
    dequantize: bool = False,
    adapter: Annotated[str | None, typer.Option(metavar="LORA")] = None,
    requantize: bool = False,
    check_base: bool = True,
    first_n_layers: _Number = None,
    n_ctx: _Number = None,
    device: str | None = None,
    device_map: str | None = None,
    max_memory: Annotated[list[str] | None, typer.Option(metavar="DEVICE=SIZE")] = None,
    strategy: str = "auto",
    mmap: bool | None = None,
    layout: str | None = None,
    check_memory: bool = True,
    revision: str | None = None,
    subfolder: str | None = None,
    gguf_file: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """The options of a load.

    What to load:
        road: Into which of TransformerLens' classes: hooked (HookedTransformer) or bridge
            (TransformerBridge). By default what a processed copy is of, else the first of the two
            that is installed.
        dtype: Of the parameters: float32, bfloat16 or float16. By default float32, or what a
            processed copy was saved in.
        processing: TransformerLens' folding and centring, as from_pretrained does or as
            from_pretrained_no_processing does.
        skip: Leave out one step: fold_ln, center_writing_weights, center_unembed or
            fold_value_biases. May be repeated.
        quantize: 8bit, nf4 or fp4, after processing.
        dequantize: Make a quantized checkpoint ordinary.
        adapter: Merge this LoRA adapter: a folder or hub name.
        requantize: Merge the adapter into quantized weights, too.
        check_base: Refuse an adapter that names another base model, or go ahead.
        first_n_layers: Load only that many layers.
        n_ctx: Another context length.

    How to load it:
        device: cpu, cuda, cuda:1 ...; by default CUDA if there is one.
        device_map: Spread the model: auto, balanced or sequential, or JSON such as
            {"": 0, "blocks.7": "cpu"}.
        max_memory: What such a map may take of a device: 0=20GiB, cpu=60GiB. May be repeated.
        strategy: auto, assign or copy.
        mmap: Map weights that need no change, or read everything. By default they are mapped
            on local disks.
        layout: Memory order of the parameters: forward, as the forward pass multiplies, or
            stock, row-major. By default forward, or what a processed copy was saved in.
        check_memory: Refuse a load that will not fit, or go ahead.

    Where it is:
        revision: Branch, tag or commit of a hub name.
        subfolder: Where in the folder or repository it lies.
        gguf_file: Which GGUF file of the folder or repository; a path of one needs no option.
        offline: Use only files that are here already.
        trust_remote_code: Run code that comes with the model.
    """


_PASSED_IF_GIVEN = (
    *("dtype", "layout", "adapter", "requantize", "device_map", "max_memory"),
    *("revision", "subfolder", "gguf_file", "local_files_only", "trust_remote_code"),
)
"""Left to the loader's own defaults unless they say something."""


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained_lean` for what was given on the command line."""
    skipped, processing, mmap = given.pop("skip") or [], given.pop("processing"), given.pop("mmap")
    check_known("--skip", skipped, _STEPS)
    check_known("--road", [given["road"]] if given["road"] else [], ROADS)
    steps = {step: processing and step not in skipped for step in _STEPS}
    arguments = {**given, **steps, "mmap": "auto" if mmap is None else mmap}
    arguments["device_map"] = _device_map(given["device_map"])
    arguments["max_memory"] = dict(map(_limit, given["max_memory"] or []))
    arguments["local_files_only"] = arguments.pop("offline")
    return {
        name: value for name, value in arguments.items() if value or name not in _PASSED_IF_GIVEN
    }


def as_options(text: str) -> str:
    """A message or a choice with options of the command line in place of Python's arguments:
    `--dtype bfloat16` for `dtype='bfloat16'`. What has no option stays as it is.
    """
    if text.startswith("--"):  # it speaks of an option, in the option's own syntax
        return text
    known = {**dict.fromkeys(inspect.signature(_shared).parameters), "local_files_only": "offline"}

    def option(found: re.Match[str]) -> str:
        name, value = found[1], (found[2] or "").strip("\"'").removeprefix("torch.")
        if name in _STEPS and value == "False":
            return f"--skip {name}"
        if name not in known:
            return found[0]
        flag = (known[name] or name).replace("_", "-")
        if value in ("True", "False"):
            return f"--{'no-' if value == 'False' else ''}{flag}"
        return f"--{flag} {value}".rstrip()

    text = _SEPARATED.sub(r"\1 ", _ARGUMENT.sub(option, text))
    text = _RAW_WAY.sub("--no-processing", text)
    text = _CLASS.sub(lambda found: f"--road {ROADS[0 if found[1] else 1]}", text)
    return text.replace(" ".join(f"--skip {step}" for step in _STEPS), "--no-processing")


def _device_map(text: str | None) -> Any:
    """A name as it is, JSON as what it says."""
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"no JSON: {error}.", param_hint="'--device-map'") from error


def _limit(text: str) -> tuple[int | str, str]:
    """A device and what may be taken of it, of a text such as "0=20GiB"."""
    device, sign, size = text.partition("=")
    if not sign:
        raise typer.BadParameter(
            f"{text!r} is no DEVICE=SIZE, such as 0=20GiB.", param_hint="'--max-memory'"
        )
    return int(device) if device.isdecimal() else device, size


def lean_class(model: str, arguments: dict[str, Any]) -> Any:
    """The class that a command loads with; takes the road out of the arguments."""
    from tl_fastload import faces

    return faces.lean_class(arguments.pop("road") or faces.road_for(model))


def check_known(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse what is none of the values that an option may have."""
    for one in given:
        if one not in known:
            raise typer.BadParameter(
                f"{one!r} is none of {', '.join(known)}.", param_hint=f"'{option}'"
            )


def command(function: Callable[..., None]) -> Callable[..., None]:
    """What typer makes a command of. Each option means what the docstring says of it under "Args";
    under another heading, the help shows it in a group of that name.

    Args:
        function: a parameter `arguments` is told the arguments of a load, and gives the command
            the options that name them.
    """
    own = {**_parameters(function), **_parameters(_always)}
    shared = _parameters(_shared) if own.pop("arguments", None) else {}

    def run(**given: Any) -> None:
        del given["debug"]
        if shared:
            given["arguments"] = _arguments({name: given.pop(name) for name in shared})
        function(**given)

    made: Any = run
    parameters = {**own, **shared}
    made.__signature__ = inspect.Signature(list(parameters.values()))
    made.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    made.__doc__ = _SECTION.sub("", inspect.getdoc(function) or "").rstrip()
    return run


def _parameters(function: Callable[..., None]) -> dict[str, inspect.Parameter]:
    """The parameters of a function as typer takes them, with what the docstring says of each."""
    found = {
        parameter.name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(function, eval_str=True).parameters.values()
    }
    for panel, entries in _SECTION.findall(inspect.getdoc(function) or ""):
        for name, text in _ENTRY.findall(entries):
            type_, info = _declared(found[name])
            info.help = " ".join(text.split())
            info.show_default = found[name].default is not None
            info.rich_help_panel = None if panel == "Args" else panel
            found[name] = found[name].replace(annotation=Annotated[type_, info])
    return found


def _declared(parameter: inspect.Parameter) -> tuple[Any, Any]:
    """The type of an option, and typer's declaration of it."""
    if get_origin(parameter.annotation) is Annotated:
        type_, info = get_args(parameter.annotation)
        return type_, copy.copy(info)
    # What is off unless it is named needs no second name to turn it off.
    names = [f"--{parameter.name.replace('_', '-')}"] if parameter.default is False else []
    return parameter.annotation, typer.Option(*names)
