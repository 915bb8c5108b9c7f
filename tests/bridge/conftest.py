"""Fixtures of the bridge's tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stock's boot of a model that sees or hears calls pip when it finds no processor."""
    called: list[object] = []

    def check_call(command: object, *_: object, **__: object) -> int:
        called.append(command)
        raise subprocess.CalledProcessError(1, "refused in tests")

    monkeypatch.setattr(subprocess, "check_call", check_call)
    yield
    assert called == []
