"""What the figures were taken on, without anything that names the machine or its user."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

import psutil

_PACKAGES = (
    "tl_fastload",
    "transformer_lens",
    "transformers",
    "torch",
    "safetensors",
    "bitsandbytes",
    "numpy",
)


def machine() -> dict[str, str | int | float]:
    """Processor, cores, memory, kernel, and how busy it was at the start."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release().split("-")[0],
        "load_average": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def label() -> str:
    """A file name for this kind of machine, such as "intel-xeon-processor-2-cores"."""
    slug = re.sub(r"[^a-z0-9]+", "-", _cpu_model().lower().replace("(r)", "")).strip("-")
    return f"{slug}-{len(os.sched_getaffinity(0))}-cores"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
