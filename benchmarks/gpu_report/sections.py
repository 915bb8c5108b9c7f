"""Sections of a report: each stands alone; what fails or finds no time is noted in its place."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.forward import synchronize
from tl_fastload.report.memory import PeakSampler, return_freed_memory, unique_bytes

Facts = dict[str, Any]
_MOST_TEXT = 400


@dataclass
class Run:
    """One report in the making.

    Args:
        device: where models are loaded.
        work: folder of the checkpoints.
        budget_seconds: for all of it.
        is_dry: tiny models, to try the report out.

    Attributes:
        has_lost_device: the device fails whatever it is asked, as it does in this process after an
            error in a kernel.
    """

    device: torch.device
    work: Path
    budget_seconds: float
    is_dry: bool
    has_lost_device: bool = False
    _began: float = field(default_factory=time.perf_counter)

    @property
    def has_cuda(self) -> bool:
        """Whether it is about a CUDA device, not tried out on the CPU."""
        return self.device.type == "cuda"

    def left_seconds(self) -> float:
        """What is left of the budget."""
        return self.budget_seconds - (time.perf_counter() - self._began)

    def attempt(
        self, found: Facts, name: str, act: Callable[[], Any], wants_seconds: float = 0.0
    ) -> None:
        """Put what a function finds under a name: its result, its error, or that it was skipped.

        Args:
            found: where to put it.
            name: of the finding.
            act: finds it.
            wants_seconds: skip it when the budget has less left; nothing is skipped in a dry run.
        """
        left = self.left_seconds()
        if left < wants_seconds and not self.is_dry:
            found[name] = {"skipped": f"{left:.0f} s left, wants {wants_seconds:.0f}"}
            return
        print(f"[{left:5.0f} s left] {name}", file=sys.stderr, flush=True)
        try:
            found[name] = act()
        except Exception as error:  # the others go on, whatever it is
            found[name] = {"error": f"{type(error).__name__}: {error}"[:_MOST_TEXT]}
        try:
            self.clean()
            synchronize(self.device)
        except Exception as error:
            found[name] = {
                "error": f"the device is lost: {error}"[:_MOST_TEXT],
                "found": found[name],
            }
            self.has_lost_device = True

    def clean(self) -> None:
        """Give back all memory that nothing holds."""
        gc.collect()
        if self.has_cuda:
            torch.cuda.empty_cache()
        return_freed_memory()

    def measured(self, act: Callable[[], Any]) -> tuple[Facts, Any]:
        """Call a function; return its time and its peaks on device and host, and its result.

        Peaks are above what there was before, also as multiples of the parameters' bytes where the
        result is a model.
        """
        self.clean()
        reserved = 0
        if self.has_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            reserved = torch.cuda.memory_reserved(self.device)
        with PeakSampler() as sampler:
            sampler.watch([self.device])
            began = time.perf_counter()
            made = act()
            synchronize(self.device)
            seconds = time.perf_counter() - began
        found: Facts = {
            "seconds": round(seconds, 4),
            "peak_host_bytes": sampler.peak_host_bytes,
            "peak_anonymous_bytes": sampler.peak_anonymous_bytes,
            "peak_device_bytes": sampler.peak_device_bytes,
        }
        if self.has_cuda:
            peak = torch.cuda.max_memory_reserved(self.device)
            found["peak_reserved_bytes"] = peak - reserved
        if isinstance(made, torch.nn.Module):
            found |= _ratios(found, unique_bytes(made.parameters()))
            found["buffer_bytes"] = unique_bytes(made.buffers())
        return found, made

    def timed(self, act: Callable[[], Any]) -> Facts:
        """As `measured`, letting the result go."""
        return self.measured(act)[0]


def _ratios(found: Facts, parameter_bytes: int) -> Facts:
    peaks = {name: size for name, size in found.items() if name.startswith("peak_") and size}
    ratios = {
        f"{name.removesuffix('_bytes')}_x": round(size / parameter_bytes, 4)
        for name, size in peaks.items()
    }
    return {"parameter_bytes": parameter_bytes, **ratios}


def errors(found: Any, at: str = "") -> Iterator[str]:
    """Every error in a report, behind the names that lead to it."""
    if isinstance(found, dict):
        for name, value in found.items():
            if name == "error":
                yield f"{at}: {value}"
            else:
                yield from errors(value, f"{at}/{name}" if at else name)
