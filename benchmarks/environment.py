"""What the figures were taken on, without anything that names the machine or its user."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata

from tl_fastload.cli import diagnosis


def machine() -> dict[str, str | int | float]:
    """Processor, cores, memory, kernel, and how busy it was at the start."""
    found = diagnosis.machine()
    return {
        "cpu": found["processor"],
        "cores": found["cores"],
        "ram_gb": round(found["memory_bytes"] / 1e9, 1),
        "kernel": platform.release().split("-")[0],
        "load_average": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part."""
    found = {**diagnosis.versions(), "numpy": metadata.version("numpy")}
    return {package: version or "not installed" for package, version in found.items()}


def label() -> str:
    """A file name for this kind of machine, such as "intel-xeon-processor-2-cores"."""
    found = diagnosis.machine()
    slug = re.sub(r"[^a-z0-9]+", "-", found["processor"].lower().replace("(r)", "")).strip("-")
    return f"{slug}-{found['cores']}-cores"
