"""Memory that serves one value after the other."""

from __future__ import annotations

import torch

from tl_fastload.recipes.spares import LEAST_BYTES, Spares

CPU = torch.device("cpu")
COUNT = LEAST_BYTES // 4


def made(spares: Spares, count: int = COUNT) -> torch.Tensor:
    return spares.empty((count,), (1,), dtype=torch.float32, device=CPU)


def test_a_block_serves_again_where_it_is_as_large() -> None:
    spares = Spares()
    spares.limit(1 << 30)
    first = made(spares)
    address = first.data_ptr()
    spares.keep(first)
    del first
    assert made(spares, COUNT * 2).data_ptr() != address
    half = spares.empty((2, COUNT), (1, 2), dtype=torch.float16, device=CPU)
    assert half.data_ptr() == address
    assert half.stride() == (1, 2)
    assert half.untyped_storage().nbytes() == LEAST_BYTES
    assert made(spares).data_ptr() != address  # it is taken


def test_no_more_is_kept_than_there_is_room_for() -> None:
    spares = Spares()
    spares.limit(3 * LEAST_BYTES)
    several = [made(spares, COUNT * size) for size in (1, 2, 1)]
    addresses = [tensor.data_ptr() for tensor in several]
    for tensor in several:
        spares.keep(tensor)
    assert made(spares).data_ptr() == addresses[0]  # the third found no room
    spares.keep(several[0])
    spares.limit(2 * LEAST_BYTES)  # the largest goes
    assert made(spares).data_ptr() == addresses[0]
    spares.limit(0)
    spares.keep(several[2])
    assert made(spares).data_ptr() != addresses[2]


def test_a_stock_is_two_blocks_of_a_size_at_most() -> None:
    spares = Spares()
    spares.stock(LEAST_BYTES)  # no room
    assert spares._kept_bytes == 0
    spares.limit(1 << 30)
    for size in (LEAST_BYTES, LEAST_BYTES, 2 * LEAST_BYTES, LEAST_BYTES, LEAST_BYTES - 1):
        spares.stock(size)
    assert spares._kept_bytes == 4 * LEAST_BYTES


def test_what_is_small_or_has_gaps_has_memory_of_its_own() -> None:
    spares = Spares()
    spares.limit(1 << 30)
    gaps = spares.empty((COUNT,), (2,), dtype=torch.float32, device=CPU)
    assert gaps.untyped_storage().nbytes() == (2 * COUNT - 1) * 4
    small = made(spares, COUNT - 1)
    address = small.data_ptr()
    spares.keep(small)
    assert made(spares, COUNT - 1).data_ptr() != address
    on_meta = spares.empty((COUNT,), (1,), dtype=torch.float32, device=torch.device("meta"))
    assert on_meta.is_meta
