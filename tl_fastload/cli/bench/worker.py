"""The measured process: prepares, does one thing, describes it, and waits after each step.

Speaks lines of JSON with `tl_fastload.cli.bench.process`, which reads its memory from outside
while it works and while it waits. Runs as a file of its own and imports nothing but the standard
library, so that a measured process holds what it measures and nothing else.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
import time
from typing import Any


def _release_free_heap() -> None:
    """Give free heap back to the system, so that a later peak cannot hide in it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def main() -> None:
    # The libraries print to stdout; the conversation keeps the real one for itself.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**found: Any) -> None:
        """Say that a step is done, and wait until the other side has looked."""
        channel.write(json.dumps(found) + "\n")
        channel.flush()
        sys.stdin.readline()

    request = json.loads(sys.stdin.readline())
    sys.path[:] = request["path"]
    module, _, function = request["target"].partition(":")
    prepare = getattr(importlib.import_module(module), function)
    act, describe = prepare(**request["arguments"])
    gc.collect()
    _release_free_heap()
    tell()

    start = time.perf_counter()
    result = act()
    tell(seconds=time.perf_counter() - start)

    gc.collect()
    tell()

    tell(facts=describe(result))  # which may use it, and so bring in pages it had only mapped


if __name__ == "__main__":
    main()
