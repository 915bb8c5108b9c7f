"""Fixtures that every test module shares."""

from __future__ import annotations

import gc
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before huggingface_hub is imported, which reads it once: no test may touch the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from hypothesis import settings

from tests.support import bridge_zoo, environments
from tests.support import zoo as zoo_module
from tests.support.fake_hub import forbid_network
from tl_fastload.source.reader import FileReader

TESTS = Path(__file__).parent
Zoo = Callable[..., Path]

# The same examples each time, on any machine; `make explore` draws others, and many.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("TL_FASTLOAD_EXAMPLES", "same"))


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "fail unless as many tests were skipped as tests/support/environments.py says"
    parser.addoption("--count-skips", action="store_true", help=text)


def pytest_report_header() -> str:
    return environments.describe()


class _NotImported(pytest.Module):
    """Stands where a file is that needs what the installed versions do not have."""

    def collect(self) -> Iterator[pytest.Item]:
        reason = environments.why_not_file(_name_of(self.path)) or ""
        test = pytest.Function.from_parent(self, name="test_file", callobj=lambda: None)
        test.add_marker(pytest.mark.parity)
        test.add_marker(pytest.mark.skip(reason=reason))
        yield test

    def _getobj(self) -> Any:
        return None


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    if environments.why_not_file(_name_of(module_path)) is None:
        return None
    return _NotImported.from_parent(parent, path=module_path)


def _name_of(path: Path) -> str:
    return path.relative_to(TESTS).as_posix()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = environments.why_not_test(f"{_name_of(item.path)}::{item.name}")
        case_id = getattr(item, "callspec", None) and item.callspec.params.get("case_id")
        reason = reason or environments.why_not_case(str(case_id))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Half a million objects of the libraries stay for good: no collection looks at them again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """The number of skipped tests, so that none is skipped that could run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not session.config.getoption("--count-skips") or reporter is None:
        return  # xdist's workers have no reporter
    found, expected = len(reporter.stats.get("skipped", ())), environments.expected_skips()
    if found != expected:
        reporter.write_line(
            f"{found} tests were skipped; tests/support/environments.py says {expected}."
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests, and processes that they start, leave in the system's folder goes with pytest's:
    torchrun removes nothing, nor does a process that is killed.
    """
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """The same random numbers each time, whichever tests a process ran before."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """`zoo(case_id, **options of zoo.build)` -> folder; each one is written once in a session.

    Treat the folders as read-only, or copy them first. `tokenizer=True` adds a word-level one.
    """
    root = tmp_path_factory.mktemp("zoo")
    built: dict[str, Path] = {}

    def get(case_id: str, *, tokenizer: bool = False, **options: Any) -> Path:
        case = zoo_module.CASES[case_id]
        if reason := environments.why_not_case(case_id):
            pytest.skip(reason)
        key = repr((case_id, tokenizer, sorted(options.items(), key=str)))
        if key not in built:
            # The last part is the repository's name, which the old .pth models are known by.
            folder = root / str(len(built)) / case.repo.rpartition("/")[2]
            zoo_module.build(case_id, folder, **options)
            if tokenizer:
                zoo_module.add_tokenizer(folder, case.d_vocab)
            built[key] = folder
        return built[key]

    return get


@pytest.fixture(scope="session")
def bridge_zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """`zoo` for the cases of the bridge's zoo, which all have a tokenizer."""
    root = tmp_path_factory.mktemp("bridge-zoo")
    built: dict[str, Path] = {}

    def get(case_id: str, **options: Any) -> Path:
        key = repr((case_id, sorted(options.items(), key=str)))
        if key not in built:
            built[key] = bridge_zoo.build(case_id, root / str(len(built)) / case_id, **options)
        return built[key]

    return get


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error must come before weights are read."""

    def read(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(FileReader, "read", read)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    forbid_network(monkeypatch)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def lens() -> Any:
    """The embedded model, frozen in the tests of Lightning. Treat it as read-only."""
    from tests.support.lightning_modules import embedded

    return embedded()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a Lightning module after one epoch beside such a model."""
    from tests.support.lightning_modules import one_epoch  # not installed in every environment

    return one_epoch(tmp_path_factory)
