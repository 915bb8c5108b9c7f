"""`python -m benchmarks.gpu_report`: measure, print the tables, write JSON and markdown."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_report.stand_ins import stand_in_for_datasets
from tl_fastload.cli.console import end_on_sigterm

if TYPE_CHECKING:
    from benchmarks.gpu_report.sections import Facts, Run

_BUDGET_SECONDS = 345.0  # with the imports, six minutes
_GRACE_SECONDS = 10.0  # after which a process that does not end is ended
_STATE, _DONE = "found.json", "done"  # in the folder of the checkpoints
_NEEDED_BYTES = 40 << 30  # the checkpoints of both shapes, and a copy of each
_RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the report; returns 1 when something in it failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    if options.work is not None:
        return _measure(options)
    with tempfile.TemporaryDirectory(prefix="gpu-report-", dir=_roomy(options.dry_run)) as work:
        return _in_processes(given, options, Path(work))


def _in_processes(given: list[str], options: argparse.Namespace, work: Path) -> int:
    """Measure in a process of its own, and what is left in another one when that ends early: a
    crash, or a device that answers nothing any more, costs the section that it happens in.
    """
    began = time.monotonic()
    state, done = work / _STATE, work / _DONE
    while not done.exists():
        before = state.read_bytes() if state.exists() else b""
        left = options.budget_seconds - (time.monotonic() - began)
        command = [sys.executable, "-m", "benchmarks.gpu_report", *given]
        command += ["--work", str(work), "--budget-seconds", str(left)]
        limit = None if options.dry_run else max(left + _GRACE_SECONDS, _GRACE_SECONDS)
        try:
            code = subprocess.run(command, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            print("The time is up.", file=sys.stderr)
            return 1
        if not done.exists():
            print(f"The process that measured ended with {code}.", file=sys.stderr)
            if not state.exists() or state.read_bytes() == before:
                return 1
    return code


def _measure(options: argparse.Namespace) -> int:
    """All sections that no process before this one has begun."""
    work: Path = options.work
    # Before the libraries are imported, which read these then.
    os.environ |= {"HF_HOME": f"{work}/hub", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    stood_in = stand_in_for_datasets()
    import torch

    from benchmarks.gpu_report.sections import Run, errors

    if not options.dry_run and not torch.cuda.is_available():
        print("There is no CUDA device here; --dry-run tries the report out.", file=sys.stderr)
        return 1
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", 0)
    run = Run(device, work, options.budget_seconds, options.dry_run)
    state = work / _STATE
    found: Facts = json.loads(state.read_text()) if state.exists() else {}
    if not found:
        found["environment"] = {"datasets_left_out": stood_in, **_environment(run)}
    folder = options.out or _folder(options.dry_run)
    for name, act, wants_seconds in _sections(run, found):
        if name in found or (options.only and name not in options.only.split(",")):
            continue
        found[name] = {"error": "the process ended in this section"}
        state.write_text(_as_json(found))
        _write(found, folder)
        run.attempt(found, name, act, wants_seconds)
        state.write_text(_as_json(found))
        _write(found, folder)
        if run.has_lost_device:
            return 1
    print(_write(found, folder))
    failed = list(errors(found))
    for failure in failed:
        print(f"FAILED {failure}", file=sys.stderr)
    (work / _DONE).touch()
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny models, on the CPU")
    parser.add_argument("--budget-seconds", type=float, default=_BUDGET_SECONDS)
    parser.add_argument("--only", default="", metavar="SECTIONS", help="bus,parity,load 1b ...")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="folder (default: $OUT, or benchmarks/results)")
    return parser


def _roomy(is_dry: bool) -> str | None:
    """Where checkpoints are written: in memory, if there is room for them."""
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > _NEEDED_BYTES
    return str(memory) if has_room and not is_dry else None


def _folder(is_dry: bool) -> Path | None:
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    return None if is_dry else _RESULTS


def _sections(run: Run, found: Facts) -> list[tuple[str, Callable[[], Any], float]]:
    """Name, what measures it, and the seconds that it wants; what matters most comes first."""
    from benchmarks.gpu_report import bus, hazards, loading, parity, using

    def load(size: str) -> Facts:
        return loading.measure(run, size, found.get("bus", {}).get("pinned_to_device"))

    sections: list[tuple[str, Callable[[], Any], float]] = [
        ("bus", lambda: bus.measure(run), 0.0),
        ("parity", lambda: parity.measure(run), 0.0),
        ("load 1b", lambda: load("1b"), 20.0),
        ("quantize 1b", lambda: using.measure_quantizing(run, "1b"), 20.0),
        ("hazards", lambda: hazards.measure(run), 20.0),
        ("forward 1b", lambda: using.measure_forward(run), 20.0),
    ]
    if run.is_dry:  # the same code
        return sections
    return [
        *sections,
        ("quantize 8b", lambda: using.measure_quantizing(run, "8b"), 60.0),
        ("load 8b", lambda: load("8b"), 45.0),
    ]


def _environment(run: Run) -> Facts:
    import torch

    from benchmarks import environment

    found: Facts = {"dry_run": run.is_dry}
    run.attempt(found, "machine", environment.machine)
    run.attempt(found, "versions", environment.versions)
    if run.has_cuda:
        run.attempt(found, "card", lambda: _card(torch.cuda.get_device_properties(run.device)))
        asked = "pcie.link.gen.current,pcie.link.width.current,driver_version"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv"]
        run.attempt(found, "driver", lambda: subprocess.check_output(command, text=True).strip())
    return found


def _card(properties: Any) -> Facts:
    return {"name": properties.name, "memory_bytes": properties.total_memory}


def _write(found: Facts, folder: Path | None) -> str:
    """The report so far, as markdown; written to the folder as well, if there is one."""
    from benchmarks.gpu_report.table import markdown

    card = found["environment"].get("card", {}).get("name", "dry run on the CPU")
    text = markdown(f"tl_fastload on {card}", found)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = "gpu_" + re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
        (folder / f"{stem}.json").write_text(_as_json(found))
        (folder / f"{stem}.md").write_text(text)
    return text


def _as_json(found: Facts) -> str:
    return json.dumps(found, indent=1, default=str) + "\n"


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
