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

from tl_fastload.cli.bench import synthetic
from tl_fastload.cli.bench.loads import Contender
from tl_fastload.cli.bench.process import Measurement, measure, measure_in_turns, read_ahead
from tl_fastload.errors import LeanLoadError
from tl_fastload.source.aliases import Aliases
from tl_fastload.source.checkpoint import Checkpoint, open_weights
from tl_fastload.source.hub import HubOptions
from tl_fastload.source.location import locate

_IMPORTS_BYTES = 1 << 30
_STOCK_BYTES_A_NUMBER = 14  # its processing upcasts everything to float32, three and a half times


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
def subject_of(
    model: str | synthetic.Shape, aliases: Aliases, keep: Path | None = None
) -> Iterator[Subject]:
    """A model in a folder or on the hub, downloaded first if need be; or random weights in a given
    shape, in a folder that is gone afterwards.

    Stock TransformerLens refuses folders: for the time of the benchmark a name of the hub leads to
    the folder, in a hub cache of its own.

    Args:
        model: a folder, a TransformerLens name or alias, a hub name, or a shape.
        aliases: the names that TransformerLens has.
        keep: write the weights of a shape into this folder, and leave it there.
    """
    with tempfile.TemporaryDirectory(prefix="tl_fastload-bench-") as scratch:
        if isinstance(model, synthetic.Shape):
            stock_name, label = model.official_name, model.name
            name = str((keep or Path(scratch) / "model").resolve())
            synthetic.write_checkpoint(model, Path(name))
        else:
            stock_name, label, name = synthetic.LLAMA_NAME, Path(model).resolve().name, model
        location = locate(name, HubOptions(), aliases=aliases)
        folder, environment = location.folder.resolve(), {"HF_HUB_OFFLINE": "1"}
        if location.repo is None:
            name = str(folder)
            hub_home = Path(scratch) / "hub-home"
            synthetic.write_hub_layout(folder, stock_name, hub_home)
            _give_n_ctx(hub_home)
            environment["HF_HOME"] = str(hub_home)
        else:
            stock_name, label = aliases.official(name) or location.repo, name
        checkpoint = open_weights(location)
        numbers = _count_numbers(checkpoint)
        yield Subject(label, name, stock_name, folder, checkpoint.files, numbers, environment)


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
    subject: Subject, contenders: Sequence[Contender], repeats: int, say: Callable[[str], None]
) -> dict[Contender, Measurement]:
    """Measure every contender `repeats` times, in turns.

    Args:
        subject: the model.
        contenders: the ways to load it.
        repeats: processes for each.
        say: told what is measured next.

    Returns:
        The measurements; an `error` says why there is none.

    Raises:
        LeanLoadError: memory cannot be measured on this system.
    """
    if not sys.platform.startswith("linux"):
        raise LeanLoadError("bench reads memory from /proc, which only Linux has.")
    for path in subject.files:
        read_ahead(path)
    rounds = [*contenders] * repeats

    def measure_one(number: int, contender: Contender) -> Measurement:
        say(f"[{number}/{len(rounds)}] {contender.name}")
        arguments = {
            "contender": asdict(contender),
            "model": subject.lean_name,
            "stock_name": subject.stock_name,
            "folder": str(subject.folder),
        }
        return measure(
            "tl_fastload.cli.bench.loads:prepare",
            arguments,
            contender.name,
            subject.environment,
            _needed_bytes(subject, contender),
            with_timeline=True,
        )

    return measure_in_turns(rounds, measure_one)


def _needed_bytes(subject: Subject, contender: Contender) -> int:
    """Memory that must be free for a load to be measured, on the safe side."""
    lean_bytes = synthetic.ITEM_BYTES[contender.dtype] * 3 // 2
    a_number = _STOCK_BYTES_A_NUMBER if contender.loader == "stock" else lean_bytes
    return _IMPORTS_BYTES + subject.numbers * a_number
