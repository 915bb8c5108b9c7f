"""Processed copies of the benchmark checkpoints, and the floor of loading one."""

from __future__ import annotations

import functools
import mmap
import subprocess
import sys
from pathlib import Path

_PAGE_BYTES = 4096
_PROJECT = Path(__file__).resolve().parents[1]


def copy_folder(folder: Path, dtype: str, quantize: str | None) -> Path:
    """Where the processed copy of a checkpoint lies.

    Args:
        folder: of the checkpoint.
        dtype: of the parameters.
        quantize: as for `from_pretrained_lean`.
    """
    return folder.parent / f"{folder.name}-copies" / f"{dtype}-{quantize or 'dense'}"


@functools.cache
def make_copy(folder: Path, dtype: str, quantize: str | None) -> Path:
    """Save the copy anew, once in a run, in a process of its own."""
    target = copy_folder(folder, dtype, quantize)
    command = [sys.executable, "-m", "benchmarks.copies", folder, dtype, quantize or "", target]
    subprocess.run(command, cwd=_PROJECT, check=True, capture_output=True)
    return target


def touch_pages(folder: Path) -> int:
    """Map every weight file of a copy and read one byte of each page; the bytes mapped.

    No load that gives the values can do less, once they are used.
    """
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            sum(pages[::_PAGE_BYTES])
            total += len(pages)
    return total


def main(folder: str, dtype: str, quantize: str, target: str) -> None:
    """Load a checkpoint processed and save it."""
    from tl_fastload import LeanHookedTransformer
    from tl_fastload.cli.bench.loads import blank_tokenizer

    model = LeanHookedTransformer.from_pretrained_lean(
        folder,
        device="cpu",
        dtype=dtype,
        quantize=quantize or None,
        tokenizer=blank_tokenizer(),
        progress=False,
    )
    model.save_lean(target, progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
