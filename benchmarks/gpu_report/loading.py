"""Loads of one shape: against the bus, against a ring of pinned buffers, transformers and stock."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file

from benchmarks.gpu_report import ring
from benchmarks.gpu_report.checkpoints import checkpoint, shape_of
from benchmarks.gpu_report.sections import Facts, Run
from benchmarks.loading import dtype_argument
from tl_fastload.cli.bench.loads import Load, lean_load, stock_load
from tl_fastload.cli.bench.synthetic import weights_file

_DTYPE = "bfloat16"
_SLOTS = 8


class Step(NamedTuple):
    """One load: its name, what loads, and how many seconds must be left for the 8B shape."""

    name: str
    act: Callable[[], Any]
    wants_seconds: float = 15.0


def measure(run: Run, size: str, pinned_rate: float | None) -> Facts:
    """Time and peaks of every load; each as a multiple of the time that the pinned bus takes.

    Args:
        run: the report.
        size: "1b" or "8b".
        pinned_rate: of the bus, in 1e9 bytes per second, if it is known.
    """
    folder = checkpoint(run, size)
    file_bytes = weights_file(folder).stat().st_size
    found: Facts = {"file_bytes": file_bytes}
    bus_seconds = file_bytes / 1e9 / pinned_rate if pinned_rate else None
    if bus_seconds:
        found["bus_seconds"] = round(bus_seconds, 4)
    for step in _steps(run, size, folder):
        wants = step.wants_seconds if size == "8b" else step.wants_seconds / 5
        run.attempt(found, step.name, lambda s=step: run.timed(s.act), wants)
        seconds = found[step.name].get("seconds")
        if bus_seconds and seconds:
            found[step.name]["x_bus"] = round(seconds / bus_seconds, 2)
    shutil.rmtree(_copy_folder(run, size), ignore_errors=True)
    return found


def lean(run: Run, folder: Path, dtype: str = _DTYPE, processed: bool = True, **more: Any) -> Load:
    """A lean load onto the device."""
    return lean_load(folder, dtype, processed, device=str(run.device), progress=False, **more)


def hf_model(run: Run, folder: Path, dtype: str = _DTYPE) -> Any:
    """transformers' own model on the device."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": run.device}, **dtype_argument(dtype)
    ).eval()


def _copy_folder(run: Run, size: str) -> Path:
    return run.work / f"{size}-copy"


def _steps(run: Run, size: str, folder: Path) -> Iterator[Step]:
    path, copy = weights_file(folder), _copy_folder(run, size)
    slots = ring.make_slots(_SLOTS, run.device)
    if size == "1b":  # a floor that is fast has to be right, too
        yield Step("ring: bytes are the file's", lambda: _check_ring(run, path, slots))
    for threads in (1, 4, 8):
        yield Step(
            f"ring, {threads} threads", lambda n=threads: ring.load(path, run.device, slots, n)
        )
    slots.clear()
    yield Step("lean bfloat16 unprocessed", lean(run, folder, processed=False))
    yield Step("lean bfloat16 unprocessed, again", lean(run, folder, processed=False))
    yield Step("lean bfloat16 processed", lean(run, folder))
    yield Step("transformers bfloat16", lambda: hf_model(run, folder))
    yield Step("safetensors.torch.load_file", lambda: load_file(path, device=str(run.device)))
    if size == "1b":
        yield Step("lean float32 processed", lean(run, folder, "float32"))
        yield Step("lean bfloat16 processed, copying", lean(run, folder, strategy="copy"))

    def save() -> None:
        lean(run, folder)().save_lean(copy, progress=False)

    yield Step("processed copy: load and save", save, 40.0)
    yield Step("processed copy: load", lean(run, copy))
    stock = [stock_load(shape_of(run, size).official_name, _DTYPE, way) for way in (False, True)]
    device = str(run.device)
    yield Step("stock bfloat16 unprocessed", lambda: stock[0](device=device), 60.0)
    yield Step("stock bfloat16 processed", lambda: stock[1](device=device), 150.0)


def _check_ring(run: Run, path: Path, slots: list[torch.Tensor]) -> None:
    there, here = ring.load(path, run.device, slots, 8), load_file(path)
    wrong = [key for key in here if not torch.equal(there[key].cpu(), here[key])]
    if wrong:
        raise ValueError(f"the ring has brought other bytes of {', '.join(wrong[:3])}")
