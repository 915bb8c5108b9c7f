"""The command line, run in the tests' own process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tl_fastload import cli


def run(*arguments: str | Path, code: int = 0) -> Any:
    """Run a command in this process, which must end with `code`."""
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == code, (done.exit_code, done.output, done.exception)
    return done


def flat(text: str) -> str:
    """Text without the frames and line breaks of a block."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)
