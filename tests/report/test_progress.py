"""Progress of a load: who is told, and when."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import reference
from tests.support.comparison import lean_model
from tl_fastload import ProgressEvent
from tl_fastload.report import progress as progress_module
from tl_fastload.report.progress import Progress


class _Terminal:
    """A standard error stream that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        """Nothing is buffered."""


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
@pytest.mark.parametrize("strategy", ["assign", "copy"])
@pytest.mark.parametrize("flags", [{}, reference.NO_PROCESSING], ids=["processed", "unprocessed"])
def test_a_callback_hears_of_every_parameter(
    flags: dict[str, bool], strategy: str, mmap: bool, zoo: Any
) -> None:
    events: list[ProgressEvent] = []
    lean = lean_model(
        zoo("llama-gqa1-tied"), progress=events.append, strategy=strategy, mmap=mmap, **flags
    )
    done = [event.done_bytes for event in events]
    assert done == sorted(done)
    assert done[0] > 0
    assert done[-1] == events[-1].total_bytes
    assert len({event.total_bytes for event in events}) == 1
    names = [event.name for event in events]
    assert len(names) == len(set(names))
    parameters = {name for name, _ in lean.named_parameters()}
    assert {name for name in names if "W_" in name} == {n for n in parameters if "W_" in n}


def test_a_callback_that_raises_stops_the_load(zoo: Any) -> None:
    def interrupt(event: ProgressEvent) -> None:
        raise KeyboardInterrupt(event.name)

    with pytest.raises(KeyboardInterrupt):
        lean_model(zoo("gpt2"), progress=interrupt)


@pytest.mark.parametrize("progress", [None, False])
def test_silent_when_nobody_watches(
    progress: bool | None, zoo: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = zoo("gpt2")
    capsys.readouterr()
    lean_model(folder, progress=progress)
    assert capsys.readouterr().err == ""


def test_false_is_silent_on_a_terminal_too(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, terminal = zoo("gpt2"), _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    lean_model(folder, progress=False)
    assert terminal.text == ""


def test_a_bar_on_a_terminal(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, terminal = zoo("gpt2"), _Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    lean_model(folder, progress=None)
    assert "loading" in terminal.text


def test_a_bar_when_asked_for(zoo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = zoo("gpt2")
    capsys.readouterr()
    lean_model(folder, progress=True)
    assert "loading" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shell", "watched"), [("ZMQInteractiveShell", True), ("TerminalInteractiveShell", False)]
)
def test_a_bar_in_a_notebook(shell: str, watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal's IPython is asked as a terminal is: by its stream."""
    running = type(shell, (), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: running))
    assert progress_module._is_watched() is watched


def test_a_process_without_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert not progress_module._is_watched()


def test_the_bar_is_gone_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(True)

    def fail() -> None:
        with progress:
            progress.start(10)
            assert progress._bar is not None
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert progress._bar is None
