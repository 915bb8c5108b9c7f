"""What loading a model costs, lean and stock, each in fresh processes."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tl_fastload.cli.bench import synthetic
from tl_fastload.cli.bench.loads import Contender, torch_dtype
from tl_fastload.cli.bench.process import Measurement, WorkerError, combine, read_ahead, run_action
from tl_fastload.errors import LeanLoadError
from tl_fastload.ground.words import format_bytes
from tl_fastload.hooked.official_names import official_name, resolve_model
from tl_fastload.report.available import available_bytes
from tl_fastload.source.checkpoint import Checkpoint, open_weights

_IMPORTS_BYTES = 1 << 30
_STOCK_BYTES_A_NUMBER = 14  # its processing upcasts everything to float32, three and a half times
Announce = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Subject:
    """The model that is loaded.

    Attributes:
        label: for people.
        lean_name: what the lean loader loads.
        stock_name: what stock TransformerLens loads.
        folder: where `config.json` lies.
        files: the weight files.
        numbers: how many numbers they hold.
        environment: variables that the measured processes get.
    """

    label: str
    lean_name: str
    stock_name: str
    folder: Path
    files: tuple[Path, ...]
    numbers: int
    environment: dict[str, str]


@contextlib.contextmanager
def named_subject(name: str) -> Iterator[Subject]:
    """A model in a folder or on the hub, downloaded first if need be.

    Stock TransformerLens refuses folders: for the time of the benchmark a name of the hub leads to
    the folder, in a hub cache of its own.

    Args:
        name: a folder, a TransformerLens name or alias, or a hub name.
    """
    location = resolve_model(name)
    checkpoint = open_weights(location)
    files, numbers = checkpoint.files, _count_numbers(checkpoint)
    offline = {"HF_HUB_OFFLINE": "1"}
    if location.repo is not None:
        stock_name = official_name(name) or location.repo
        yield Subject(name, name, stock_name, location.folder, files, numbers, offline)
        return
    with tempfile.TemporaryDirectory(prefix="tl_fastload-bench-") as hub_home:
        folder = location.folder.resolve()
        synthetic.write_hub_layout(folder, synthetic.LLAMA_NAME, Path(hub_home))
        _give_n_ctx(Path(hub_home))
        environment = {**offline, "HF_HOME": hub_home}
        yield Subject(
            folder.name, str(folder), synthetic.LLAMA_NAME, folder, files, numbers, environment
        )


@contextlib.contextmanager
def synthetic_subject(shape: synthetic.Shape, keep: Path | None = None) -> Iterator[Subject]:
    """A model of random weights in a given shape, in a folder that is gone afterwards.

    Args:
        shape: of the model.
        keep: write it into this folder instead, and leave it there.
    """
    with tempfile.TemporaryDirectory(prefix="tl_fastload-bench-") as scratch:
        folder = (keep or Path(scratch) / "model").resolve()
        synthetic.write_checkpoint(shape, folder)
        hub_home = Path(scratch) / "hub-home"
        synthetic.write_hub_layout(folder, shape.official_name, hub_home)
        environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(hub_home)}
        files = (synthetic.weights_file(folder),)
        numbers = synthetic.file_bytes(shape) // synthetic.item_bytes(shape.file_dtype)
        yield Subject(
            shape.name, str(folder), shape.official_name, folder, files, numbers, environment
        )


def _give_n_ctx(hub_home: Path) -> None:
    """Write the field `n_ctx` into GPT-2's configuration, which TransformerLens reads and
    transformers 5 no longer writes.
    """
    for path in hub_home.rglob("config.json"):
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.get("model_type") == "gpt2" and "n_ctx" not in fields:
            path.unlink()  # a link to the user's own file
            text = json.dumps({**fields, "n_ctx": fields.get("n_positions", 1024)})
            path.write_text(text, encoding="utf-8")


def _count_numbers(checkpoint: Checkpoint) -> int:
    """How many numbers the weight files hold, from above where headers do not say."""
    if checkpoint.entries:
        return sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    return sum(path.stat().st_size for path in checkpoint.files) // 2


def run(
    subject: Subject, contenders: Sequence[Contender], repeats: int, announce: Announce
) -> list[Measurement]:
    """Measure every contender `repeats` times, in turns, so that a machine that gets slower
    meanwhile changes all of them alike.

    Args:
        subject: the model.
        contenders: the ways to load it.
        repeats: processes for each.
        announce: told what is measured next, its number, and how many there are.

    Returns:
        One measurement for each contender; its `error` says why there is none.

    Raises:
        LeanLoadError: memory cannot be measured on this system.
    """
    if not sys.platform.startswith("linux"):
        raise LeanLoadError("bench reads memory from /proc, which only Linux has.")
    for path in subject.files:
        read_ahead(path)
    found: dict[str, list[Measurement]] = {contender.name: [] for contender in contenders}
    for turn in range(repeats):
        for number, contender in enumerate(contenders, start=turn * len(contenders) + 1):
            earlier = found[contender.name]
            if earlier and earlier[-1].error is not None:
                continue  # it will not fit, or fail, again
            announce(contender.name, number, repeats * len(contenders))
            earlier.append(_measure(subject, contender))
    return [combine(repeated) for repeated in found.values()]


def _measure(subject: Subject, contender: Contender) -> Measurement:
    need, free = _needed_bytes(subject, contender), available_bytes(torch.device("cpu"))
    if free is not None and need > free:
        error = f"not measured: needs {format_bytes(need)}, {format_bytes(free)} are free"
        return Measurement(contender.name, error=error)
    arguments = {
        "contender": asdict(contender),
        "model": subject.lean_name,
        "stock_name": subject.stock_name,
        "folder": str(subject.folder),
    }
    try:
        return run_action(
            "tl_fastload.cli.bench.loads:prepare",
            arguments,
            contender.name,
            subject.environment,
            with_timeline=True,
        )
    except WorkerError as error:
        return Measurement(contender.name, error=f"failed: {error}")


def _needed_bytes(subject: Subject, contender: Contender) -> int:
    """Memory that must be free for a load to be measured, on the safe side."""
    item_bytes = torch.empty(0, dtype=torch_dtype(contender.dtype)).element_size()
    a_number = _STOCK_BYTES_A_NUMBER if contender.loader == "stock" else item_bytes * 3 // 2
    return _IMPORTS_BYTES + subject.numbers * a_number
