"""What may go wrong around a load on a device, tried out."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_report.checkpoints import checkpoint
from benchmarks.gpu_report.loading import lean
from benchmarks.gpu_report.parity import largest_difference, log_probs, state, tiny_model
from benchmarks.gpu_report.sections import Facts, Run
from tl_fastload.cli.bench.loads import lean_load
from tl_fastload.errors import NotEnoughMemory
from tl_fastload.report.memory import stored_parts

_CHILD_SECONDS = 90
_BUSY_CYCLES = 50_000_000
_HELD_BYTES = 1 << 20
_TF32_DIFFERENCE = 1e-4  # of log-probs in float32; TF32 alone makes ten times as much
_ROOM_BYTES = 1 << 30  # less than the 1.1B shape takes


def measure(run: Run) -> Facts:
    """One finding each; those about CUDA alone are left out of a dry run."""
    folder = tiny_model(run, "gpt2")
    anywhere: dict[str, Callable[..., Any]] = {
        "default device": _default_device,
        "float32 products in TF32": _tf32,
        "cpu load and fork": _fork,
    }
    on_cuda: dict[str, Callable[..., Any]] = {
        "second load": _second_load,
        "nf4 on a side stream": _side_stream,
        "peak statistics": _peak_statistics,
        "out of memory": _out_of_memory,
    }
    found: Facts = {}
    for name, act in {**anywhere, **(on_cuda if run.has_cuda else {})}.items():
        run.attempt(found, name, partial(act, run, folder), 5.0)
    return found


def _default_device(run: Run, folder: Path) -> Facts:
    load = lean(run, folder, "float32")
    expected = state(load())
    torch.set_default_device("meta")
    try:
        found = load()
    finally:
        torch.set_default_device(None)
    return _no_more_than(0.0, {"difference": largest_difference(expected, state(found))})


def _no_more_than(most: float, facts: Facts) -> Facts:
    """Findings, as an error where one of them is larger."""
    wrong = {name: value for name, value in facts.items() if not value <= most}
    return {**facts, "error": f"more than {most}: {wrong}"} if wrong else facts


@contextmanager
def _in_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _tf32(run: Run, folder: Path) -> Facts:
    """What loads under this setting give without it: factors may differ, their products not."""
    tokens = torch.arange(3, 35, device=run.device)[None]
    found = {}
    for name, refactor in (("processed", False), ("refactored", True)):
        load = lean(run, folder, "float32", refactor_factored_attn_matrices=refactor)
        with _in_tf32():
            there = load()
        with torch.inference_mode():
            outputs = [log_probs(model(tokens)) for model in (load(), there)]
        found[f"{name}_log_probs_difference"] = float((outputs[0] - outputs[1]).abs().max())
    return _no_more_than(_TF32_DIFFERENCE, found)


def _fork(run: Run, folder: Path) -> Facts:
    command = [sys.executable, "-m", "benchmarks.gpu_report.forked", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_CHILD_SECONDS, check=False
    )
    if done.returncode:
        return {"error": done.stderr[-400:]}
    found: Facts = json.loads(done.stdout.splitlines()[-1])
    is_well = not found["forked_load_status"] and not found["cuda_initialised_by_a_cpu_load"]
    return found if is_well else {**found, "error": done.stderr[-400:] or "see above"}


def _second_load(run: Run, folder: Path) -> Facts:
    held = []
    for _ in range(3):
        lean(run, folder)()
        gc.collect()
        held.append(torch.cuda.memory_allocated(run.device))
    found: Facts = {"held_after_each_bytes": held}
    return {**found, "error": "loads leave memory behind"} if held[-1] > held[0] else found


def _side_stream(run: Run, folder: Path) -> Facts:
    load = lean(run, checkpoint(run, "1b"), quantize="nf4", first_n_layers=2)

    def parts() -> dict[str, list[torch.Tensor]]:
        model = load()
        torch.cuda.synchronize(run.device)
        return {k: [t.cpu() for t in stored_parts(p)] for k, p in model.named_parameters()}

    expected, wrong = parts(), set()
    for _ in range(2):
        with torch.cuda.stream(torch.cuda.Stream(run.device)):
            torch.cuda._sleep(_BUSY_CYCLES)
            for name, tensors in parts().items():
                if not all(map(torch.equal, tensors, expected[name])):
                    wrong.add(name)
    found: Facts = {"parameters": len(expected), "wrong": sorted(wrong)}
    return {**found, "error": "other bytes on a side stream"} if wrong else found


def _peak_statistics(run: Run, folder: Path) -> Facts:
    torch.empty(_ROOM_BYTES // 4, dtype=torch.uint8, device=run.device)  # a peak of the caller's
    before = torch.cuda.max_memory_allocated(run.device)
    lean_load(folder, "float32", True, device="cpu", progress=False)()
    after = torch.cuda.max_memory_allocated(run.device)
    found: Facts = {"left_to_the_caller": before == after}
    return found if before == after else {**found, "error": f"{before} has become {after}"}


def _out_of_memory(run: Run, folder: Path) -> Facts:
    """With the check of memory and without: what is raised, and what is held while it is kept."""
    big = checkpoint(run, "1b")
    total = torch.cuda.get_device_properties(run.device).total_memory
    found: Facts = {}
    for name, check in (("checked", True), ("unchecked", False)):
        run.clean()
        before = torch.cuda.memory_allocated(run.device)
        room = torch.cuda.memory_reserved(run.device) + _ROOM_BYTES
        torch.cuda.set_per_process_memory_fraction(room / total, run.device)
        try:
            lean(run, big, check_memory=check)()
            found[name] = {"error": "nothing was raised"}
        except Exception as error:
            held = torch.cuda.memory_allocated(run.device) - before
            found[name] = {"raised": type(error).__name__, "held_with_the_error_bytes": held}
            if not isinstance(error, NotEnoughMemory) or held > _HELD_BYTES:
                found[name]["error"] = f"{type(error).__name__} with {held} bytes held"
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, run.device)
    return found
