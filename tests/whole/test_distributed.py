"""Lenses in two processes: wrapped for data parallel training, and sharded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    module = "tests.support.distributed_lens"
    running = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(tmp_path)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    for process in running:
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told[-3000:]
