"""How many threads an operation takes beside those that work ahead: a thread has its own number."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tl_fastload.ground import cores as cores_module
from tl_fastload.ground.cores import Cores, pause

pytestmark = pytest.mark.skipif(
    not hasattr(cores_module._OPENMP, "omp_set_num_threads"), reason="needs OpenMP's own functions"
)


@pytest.fixture(autouse=True)
def four_wide() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("helpers", "left"), [(0, 4), (1, 3), (2, 2), (3, 1), (9, 1)])
def test_an_operation_takes_what_helpers_leave(helpers: int, left: int) -> None:
    cores = Cores()
    cores.helpers = helpers
    with cores.beside_helpers():
        assert torch.get_num_threads() == left
    assert torch.get_num_threads() == 4


def test_the_number_is_given_back_after_an_error() -> None:
    cores = Cores()
    cores.helpers = 2
    with pytest.raises(KeyError), cores.beside_helpers():
        raise KeyError
    assert torch.get_num_threads() == 4


def test_no_other_thread_sees_it() -> None:
    cores = Cores()
    cores.helpers = 2
    with ThreadPoolExecutor(1) as other:
        before = other.submit(torch.get_num_threads).result()
        with cores.beside_helpers():
            assert torch.get_num_threads() == 2
            assert other.submit(torch.get_num_threads).result() == before


def test_a_helper_is_one_wide_and_pauses_while_the_loading_thread_computes_alone() -> None:
    cores = Cores()
    cores.helpers = 1
    passed = threading.Event()

    def help_once() -> int:
        pause()
        passed.set()
        return torch.get_num_threads()

    with ThreadPoolExecutor(1, initializer=cores.help) as helper:
        with cores.alone():
            assert torch.get_num_threads() == 4
            pause()  # no helper: returns at once
            told = helper.submit(help_once)
            assert not passed.wait(0.05)
        assert told.result(timeout=60) == 1


def test_nobody_pauses_for_one_thread_or_without_helpers() -> None:
    cores = Cores()
    with cores.alone():
        assert cores._free.is_set()
    cores.helpers = 1
    torch.set_num_threads(1)
    with cores.alone():
        assert cores._free.is_set()
