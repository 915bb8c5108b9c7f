"""What importing tl_fastload, with everything in it, adds to `import transformer_lens`."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

from tl_fastload.cli.bench.process import Measurement, combine, measure

_REPEATS = 5


def prepare() -> tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]:
    """Runs in the measured process: TransformerLens first, unmeasured."""
    start = time.perf_counter()
    importlib.import_module("transformer_lens")
    seconds = time.perf_counter() - start
    return _import_all, lambda _: {"transformer_lens_seconds": seconds}


def _import_all() -> list[Any]:
    """`from tl_fastload import *`: the package imports a name when it is first asked for."""
    package = importlib.import_module("tl_fastload")
    return [getattr(package, name) for name in package.__all__]


def measure_import() -> Measurement:
    """The import, in five fresh processes, and once before to have the bytecode compiled."""
    name = "import tl_fastload"
    runs = [measure("benchmarks.imports:prepare", {}, name, {}) for _ in range(_REPEATS + 1)]
    return combine(runs[1:])
