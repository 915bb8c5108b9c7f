"""Processes that need not import the libraries again: forked from one that has."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def in_fork(act: Callable[[], Any]) -> Any:
    """What a call returns in a child of this process, which goes with all that it did."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        try:
            torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
            answer = act(), None
        except BaseException:
            answer = None, traceback.format_exc()
        with os.fdopen(into, "wb") as file:
            pickle.dump(answer, file)
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as file:
        told = file.read()
    status = os.waitpid(child, 0)[1]
    assert told, f"the child ended with {os.waitstatus_to_exitcode(status)}"
    answer, error = pickle.loads(told)
    assert error is None, error
    return answer


# Runs each question in a child of a process in which only the first line of the request has run.
_ASKED = """
import json, os, sys
first, questions = json.loads(sys.stdin.read())
known = {"__name__": "__main__"}
exec(first, known)
for number, (code, arguments) in enumerate(questions):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{sys.argv[1]}/{number}.txt", os.O_WRONLY | os.O_CREAT), 1)
        sys.argv[1:] = arguments
        try:
            exec(code, known)
            sys.stdout.flush()
            os._exit(0)
        finally:  # the traceback is printed when the child ends by itself
            sys.stdout.flush()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"question {number} failed")
"""


def asked_afresh(
    first: str, questions: Sequence[tuple[str, Sequence[Any]]], folder: Path, **environment: str
) -> list[str]:
    """The last line that each piece of code prints, in children of a fresh process, in which
    `first` has run and nothing else.

    Args:
        first: code.
        questions: code and its arguments, which are texts in `sys.argv[1:]`.
        folder: for what they print.
        **environment: variables of the process beside this one's.
    """
    request = json.dumps([first, [(code, [*map(str, given)]) for code, given in questions]])
    done = subprocess.run(
        [sys.executable, "-c", _ASKED, str(folder)],
        input=request,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [folder / f"{number}.txt" for number in range(len(questions))]
    return [path.read_text(encoding="utf-8").strip().splitlines()[-1] for path in printed]
