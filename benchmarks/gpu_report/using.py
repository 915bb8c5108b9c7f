"""What comes after a dense load: quantizing on the way, and forward passes."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.forward import sample_log_probs, time_forward
from benchmarks.gpu_report.checkpoints import checkpoint
from benchmarks.gpu_report.loading import hf_model, lean
from benchmarks.gpu_report.sections import Facts, Run

_KINDS = ("8bit", "nf4")
_TOKENS = (1, 64)


def measure_quantizing(run: Run, size: str) -> Facts:
    """Time and peaks of loads that quantize on the way."""
    folder = checkpoint(run, size)
    found: Facts = {}
    for kind in _KINDS:
        load = lean(run, folder, quantize=kind)
        run.attempt(found, kind, lambda load=load: run.timed(load), 20.0)
    return found


def measure_forward(run: Run) -> Facts:
    """Milliseconds of the 1.1B shape's passes at batch 1, and multiples of transformers'."""
    found: Facts = {}
    for dtype in ("float32", "bfloat16"):
        run.attempt(found, dtype, lambda d=dtype: _forward(run, d), 15.0)
    return found


def _forward(run: Run, dtype: str) -> Facts:
    folder = checkpoint(run, "1b")
    loads: dict[str, Any] = {
        "transformers": lambda: hf_model(run, folder, dtype),
        "lean": lean(run, folder, dtype),
    }
    if dtype == "bfloat16":
        loads |= {f"lean {kind}": lean(run, folder, dtype, quantize=kind) for kind in _KINDS}
    found: Facts = {}
    for name, load in loads.items():
        run.attempt(found, name, lambda load=load: _times(load()))
    reference = found["transformers"]
    for name, one in found.items():
        if name != "transformers" and not {"error", "skipped"} & (one.keys() | reference.keys()):
            for n in _TOKENS:
                one[f"tokens_{n}_x"] = round(one[f"tokens_{n}_ms"] / reference[f"tokens_{n}_ms"], 3)
            pairs = torch.tensor([one["log_probs"], reference["log_probs"]])
            one["log_probs_difference"] = float((pairs[0] - pairs[1]).abs().max())
    for one in found.values():
        one.pop("log_probs", None)
    return found


def _times(model: Any) -> Facts:
    times = {f"tokens_{n}_ms": round(time_forward(model, n) * 1000, 4) for n in _TOKENS}
    return {**times, "log_probs": sample_log_probs(model)}
