"""Run in a process of its own: saves that are killed, caches filled at once, shared memory.

Processes are forked from one that has imported everything, so that a killed one costs nothing but
what it did.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tl_fastload import LeanHookedTransformer, verify_copy
from tl_fastload.copies.manifest import read_manifest
from tl_fastload.embedded_model import embedded_model_path


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


# What a save asks of the file system, by the names of the C functions behind it.
_STEPS = ("mkdir", "open", "write", "fsync", "rename", "replace", "scandir", "unlink", "rmdir")


def killed(folder: Path, times: int) -> dict[str, Any]:
    """Kill saves that are under way, as often as asked for in each of two ways: by the clock, and
    in front of a step of the file system. After each, the folder is absent or one whole copy.
    """
    random.seed(0)
    model = load()
    model.save_lean(folder / "first", progress=False)  # imports what saving needs
    return {how: _killed(folder / how, times, how, model) for how in ("clock", "step")}


def _killed(folder: Path, times: int, how: str, model: Any) -> dict[str, Any]:
    folder.mkdir()
    target = folder / "copy"
    # By whether a copy is there already: it is then replaced, in other steps.
    lengths = [_length(folder / "timed", how, model) for _ in range(2)]
    counts = dict.fromkeys(("kills", "finished", "absent", "old", "new", "left"), 0)
    while counts["kills"] < times and counts["finished"] < 10 * times:
        turn = float(counts["kills"] + counts["finished"] + 1)
        if random.random() < 0.5:
            model.unembed.b_U.data.fill_(-turn)
            model.save_lean(target, progress=False)
        elif target.exists():
            shutil.rmtree(target)
        model.unembed.b_U.data.fill_(turn)
        is_there = target.exists()
        # Half of the moments are late ones, in which it is decided which copy is there.
        moment = lengths[is_there] * random.choice((random.random(), random.uniform(0.8, 1)))
        was_killed = _saves(target, model, how, moment)
        counts["kills" if was_killed else "finished"] += 1
        if not was_killed:
            continue
        counts["left"] += any(path.name.startswith(".copy") for path in folder.iterdir())
        if not target.exists():
            assert not is_there
            counts["absent"] += 1
            continue
        value = _whole(target, is_loaded=turn % 10 == 0)
        assert value == turn or (is_there and value == -turn), value
        counts["new" if value == turn else "old"] += 1
    model.save_lean(target, progress=False)
    _whole(target, is_loaded=True)
    files = sorted(path.name.split("-")[0] for path in target.iterdir())
    return {**counts, "files": files, "around": sorted(path.name for path in folder.iterdir())}


def _whole(target: Path, is_loaded: bool) -> float:
    """What marks the copy that is there, every byte of which is as it was saved."""
    verify_copy(target)
    if is_loaded:
        return load(target).unembed.b_U[0].item()
    name, *others = read_manifest(target).files
    assert not others
    with safe_open(target / name, "pt") as file:
        return file.get_tensor("unembed.b_U")[0].item()


def _length(target: Path, how: str, model: Any) -> float:
    """How long a save takes: seconds, or steps."""
    steps, start = Steps(), time.perf_counter()
    with steps if how == "step" else nullcontext():
        model.save_lean(target, progress=False)
    return steps.count if how == "step" else time.perf_counter() - start


def _saves(target: Path, model: Any, how: str, moment: float) -> bool:
    """Save in a process that is killed at that moment; whether it was under way then."""
    out, into = os.pipe()

    def save() -> None:
        os.write(into, b"begun ")
        with Steps(last=int(moment)) if how == "step" else nullcontext():
            model.save_lean(target, progress=False)
        os.write(into, b"done")

    process = fork(save)
    os.close(into)
    told = os.read(out, 6)
    if how == "clock":
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    told += os.read(out, 4)
    os.close(out)
    assert told.startswith(b"begun"), told
    assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL, status
    assert told == b"begun done" or os.WIFSIGNALED(status), "the save failed"
    return told == b"begun "


class Steps:
    """Counts the steps that this process asks of the file system; kills it in front of one.

    Attributes:
        count: of the steps so far.
    """

    def __init__(self, last: int | None = None) -> None:
        self.count, self._last = 0, last

    def __enter__(self) -> Steps:
        sys.setprofile(self._saw)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)

    def _saw(self, frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ in _STEPS:
            if self.count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


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


def run_programs(folder: Path, numbers: dict[str, int]) -> dict[str, Any]:
    """What programs found, by their names, each run so many times."""
    programs = {"killed": killed, "together": together, "shared": shared}
    found = {}
    for name, number in numbers.items():
        place = folder / name
        place.mkdir()
        found[name] = programs[name](place, number)
    return found
