"""The measured process: prepares, reports that it is ready, does one thing, says what it cost.

Speaks lines of JSON with `benchmarks.measure`, which samples its memory from outside meanwhile.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any

from benchmarks.proc import own_memory, release_free_heap, reset_peak_resident


def main() -> None:
    # The libraries print to stdout; the conversation keeps the real one for itself.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    request = json.loads(sys.stdin.readline())
    module, _, function = request["target"].partition(":")
    prepare = getattr(importlib.import_module(module), function)
    act, describe = prepare(**request["arguments"])
    gc.collect()
    release_free_heap()

    send(event="ready")
    sys.stdin.readline()
    baseline = own_memory()
    peak_is_exact = reset_peak_resident()
    start = time.perf_counter()
    result = act()
    seconds = time.perf_counter() - start
    end = own_memory()

    send(event="done")
    sys.stdin.readline()  # sampling has stopped: what follows is not part of the figures
    gc.collect()
    after = own_memory()
    facts = describe(result)  # which may use the result, and so bring in pages it had only mapped
    used = own_memory()
    send(
        event="result",
        seconds=seconds,
        baseline=asdict(baseline),
        end=asdict(end),
        after=asdict(after),
        peak_is_exact=peak_is_exact,
        used=asdict(used),
        facts=facts,
    )


if __name__ == "__main__":
    main()
