"""Run in a process of its own: saves that are killed, caches filled at once, shared memory.

`python store_programs.py FOLDER NAME=NUMBER ...` prints one line of JSON. Processes are forked from
one that has imported everything, so that a killed one costs nothing but what it did.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

from tl_fastload import LeanHookedTransformer, verify_copy  # noqa: E402
from tl_fastload.embedded_model import embedded_model_path  # noqa: E402


def load(name: str | Path | None = None, **arguments: Any) -> Any:
    name = embedded_model_path() if name is None else name
    return LeanHookedTransformer.from_pretrained_lean(name, device="cpu", **arguments)


def fork(act: Callable[[], None]) -> int:
    process = os.fork()
    if process:
        return process
    try:
        act()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def killed(folder: Path, times: int) -> dict[str, Any]:
    """Kill saves at random moments; after each, the folder is absent or one whole copy."""
    target, model = folder / "copy", load()
    random.seed(0)
    start = time.perf_counter()
    os.waitpid(fork(lambda: model.save_lean(folder / "timed", progress=False)), 0)
    seconds = time.perf_counter() - start
    counts = {"absent": 0, "old": 0, "new": 0, "finished": 0, "left": 0}
    saved: set[float] = set()
    for turn in range(times):
        model.unembed.b_U.data.fill_(float(turn + 1))
        process = fork(lambda: model.save_lean(target, progress=False))
        time.sleep(random.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        counts["finished"] += os.WIFEXITED(status)
        counts["left"] += any(path.name.startswith(".copy") for path in folder.iterdir())
        if not target.exists():
            counts["absent"] += 1
            continue
        verify_copy(target)
        value = float(load(target).unembed.b_U[0])
        assert value in {*saved, float(turn + 1)}, value
        counts["new" if value == turn + 1 else "old"] += 1
        saved = {value}
        if turn % 5 == 4:  # and now and then from nothing
            for path in sorted(target.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            target.rmdir()
            saved = set()
    model.save_lean(target, progress=False)
    verify_copy(target)
    files = sorted(path.name.split("-")[0] for path in target.iterdir())
    return {**counts, "files": files, "around": sorted(path.name for path in folder.iterdir())}


def together(folder: Path, times: int) -> dict[str, Any]:
    """Several processes fill one cache entry at the same moment."""
    model = load()
    said = []
    for turn in range(times):
        cache = folder / str(turn)
        begin = time.time() + 0.3

        def fill(cache: Path = cache, begin: float = begin) -> None:
            time.sleep(max(0.0, begin - time.time()))
            made = load(cache=cache)
            assert torch.equal(made.W_E, model.W_E)
            assert made.load_report.cache.split(":")[0] in ("filled", "hit", _OTHER)

        processes = [fork(fill) for _ in range(3)]
        statuses = [os.waitpid(process, 0)[1] for process in processes]
        inside = [path.name for path in cache.iterdir()]
        again = load(cache=cache)
        verify_copy(cache / inside[0])
        said.append([statuses, len(inside), again.load_report.cache.split(":")[0]])
    return {"said": said}


_OTHER = "filled by another process"


def shared(folder: Path, times: int) -> dict[str, Any]:
    """Memory of one process that maps a copy, and of several together (proportional shares)."""
    cfg = {"n_layers": 2, "d_model": 512, "d_head": 64, "n_ctx": 16, "d_vocab": 9, "act_fn": "relu"}
    model = LeanHookedTransformer({**cfg, "device": "cpu", "d_mlp": 8192})
    model.save_lean(folder / "copy", progress=False)
    del model

    def use() -> Any:
        load_raw = LeanHookedTransformer.from_pretrained_no_processing_lean
        held = load_raw(folder / "copy", device="cpu", progress=False)
        with torch.no_grad():
            held(torch.arange(8)[None])
        return held

    def hold(ready: int, wait: int) -> None:
        use()  # what the libraries keep, and what forking copies, is not the model's
        before = anonymous()
        held = use()
        os.write(ready, b"x")
        os.read(wait, 1)  # all of them have it mapped
        cost = pss(folder) + max(0, anonymous() - before)
        os.write(ready, json.dumps(cost).encode())
        os.read(wait, 1)
        del held

    return {"one": _run(hold, 1), "several": _run(hold, times)}


def _run(hold: Callable[[int, int], None], times: int) -> int:
    """Bytes of some processes together, measured while all of them hold the model."""
    total, pipes = 0, []
    for _ in range(times):
        (ready_out, ready_in), (wait_out, wait_in) = os.pipe(), os.pipe()
        process = fork(lambda r=ready_in, w=wait_out: hold(r, w))  # type: ignore[misc]
        pipes.append((process, ready_out, wait_in))
    for _, ready, _ in pipes:
        os.read(ready, 1)
    for _, ready, wait in pipes:
        os.write(wait, b"x")
        total += int(os.read(ready, 100))
    for process, _, wait in pipes:
        os.write(wait, b"x")
        os.waitpid(process, 0)
    return total


def pss(folder: Path) -> int:
    """Proportional bytes of the mappings of files in a folder."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            counts = str(folder) in line
        elif counts and words[0] == "Pss:":
            total += int(words[1]) * 1024
    return total


def anonymous() -> int:
    """Anonymous bytes that this process has written since it was forked."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Private_Dirty in /proc/self/smaps_rollup")


if __name__ == "__main__":
    real, _ = os.dup(1), os.dup2(2, 1)  # the libraries print
    programs = {"killed": killed, "together": together, "shared": shared}
    found = {}
    for name, number in (argument.split("=") for argument in sys.argv[2:]):
        place = Path(sys.argv[1]) / name
        place.mkdir()
        found[name] = programs[name](place, int(number))
    os.write(real, json.dumps(found).encode())
