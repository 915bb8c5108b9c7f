"""Reading and mapping: every way from a file's bytes to a tensor, whole, in pieces, cast, cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support.programs import AllocatedBytes, assert_same
from tl_fastload.errors import CheckpointError
from tl_fastload.ground.geometry import has_overlap, is_dense, span
from tl_fastload.source import reader as reading
from tl_fastload.source.reader import (
    FileMaps,
    FileReader,
    FileSource,
    byte_span,
)
from tl_fastload.source.safetensors import DTYPES, TensorEntry, read_header

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALL_DTYPES = [dtype for dtype in DTYPES.values() if dtype not in (torch.complex64,)]
TINY = 16


@pytest.fixture
def reader() -> Iterator[FileReader]:
    made = FileReader()
    yield made
    made.close()


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", TINY)
    monkeypatch.setattr(reading, "HELD_SPAN_BYTES", TINY)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def write(path: Path, pad: int = 0, **tensors: torch.Tensor) -> dict[str, TensorEntry]:
    """A hand-made file; `pad` spaces end the header, so that the data lies at any offset."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        end = len(data) + tensor.nbytes
        where = {"shape": list(tensor.shape), "data_offsets": [len(data), end]}
        header[name] = {"dtype": NAMES[tensor.dtype], **where}
        data += bytes_of(tensor)
    text = json.dumps(header).encode()
    text += b" " * ((-len(text)) % 8 + pad)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return dict(read_header(path))


def meta(source: FileSource) -> torch.Tensor:
    return torch.empty_strided(source.shape, source.stride, dtype=source.dtype, device="meta")


def read(source: FileSource, view: Callable[[Any], Any], *casts: torch.dtype) -> torch.Tensor:
    geometry = view(meta(source))
    dtype = casts[-1] if casts else source.dtype
    out = torch.empty_like(geometry, dtype=dtype, device="cpu")
    source.read_into(out, geometry, casts)
    return out


VIEWS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda x: x,
    "rows": lambda x: x[1:3],
    "transposed": lambda x: x.transpose(0, 1),
    "columns": lambda x: x[:, 1:3],
    "steps": lambda x: x[::2, :, ::3],
    "one": lambda x: x[2, 1, 3],
    "line": lambda x: x[2, :, 3],
    "permuted slice": lambda x: x[1:, :, 1:5].permute(2, 0, 1),
    "expanded": lambda x: x[1].expand(3, *x[1].shape),
    "expanded line": lambda x: x[:, :1, 2:3].expand(-1, 4, 5),
    "wide first dimension of one": lambda x: x[:1, ::2].transpose(0, 2),
    "nothing": lambda x: x[:, 2:2],
    "diagonal": lambda x: x.diagonal(0, 0, 2),
}


@pytest.mark.parametrize("casts", [(), (torch.float16,), (torch.bfloat16, torch.float64)])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("tiny", [False, True])
def test_every_view_and_cast(
    view: str, casts: Any, tiny: bool, tmp_path: Path, reader: FileReader, request: Any
) -> None:
    if tiny:
        request.getfixturevalue("tiny_pieces")
    x = torch.randn(4, 3, 7)
    entries = write(tmp_path / "m.safetensors", pad=1, before=torch.ones(3), x=x)
    expected = VIEWS[view](x)
    for dtype in casts:
        expected = expected.to(dtype)
    for _ in range(2):  # the second time, the scratch may hold the range already
        assert_same(read(FileSource(entries["x"], reader), VIEWS[view], *casts), expected)


@settings(max_examples=60)
@given(
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=5),
    held=st.sampled_from([8, 16, 64, 1 << 20]),
)
def test_random_views(steps: Any, held: int, tmp_path_factory: Any) -> None:
    def view(x: torch.Tensor) -> torch.Tensor:
        for kind, number in steps:
            dim = number % x.dim()
            if kind == 0:
                x = x.movedim(dim, 0)
            elif kind == 1 and x.shape[dim] > 1:
                x = x.narrow(dim, 1, x.shape[dim] - 1)
            elif kind == 2:
                x = x.unflatten(dim, (1, x.shape[dim])) if x.dim() < 5 else x
            elif kind == 3:
                x = x[(slice(None),) * dim + (slice(None, None, 2),)]
        return x

    x = torch.randn(5, 4, 6)
    entries = write(tmp_path_factory.mktemp("v") / "m.safetensors", pad=3, x=x)
    reader = FileReader()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "HELD_SPAN_BYTES", held)
        patch.setattr(reading, "CHUNK_BYTES", 24)
        assert_same(read(FileSource(entries["x"], reader), view), view(x))
        assert_same(read(FileSource(entries["x"], reader), view, torch.float64), view(x).double())
    reader.close()


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("pad", [0, 1, 5])
def test_all_dtypes_at_any_offset(
    dtype: torch.dtype, pad: int, tmp_path: Path, reader: FileReader, tiny_pieces: None
) -> None:
    raw = torch.randint(0, 2, (4 * 6 * 8,), dtype=torch.uint8)
    x = raw.view(dtype)[:24].reshape(4, 6)
    entries = write(tmp_path / "m.safetensors", pad=pad, odd=torch.ones(3, dtype=torch.uint8), x=x)
    source = FileSource(entries["x"], reader)
    assert bytes_of(read(source, lambda t: t)) == bytes_of(x)
    assert bytes_of(read(source, lambda t: t[:, 1:4])) == bytes_of(x[:, 1:4])


@pytest.mark.parametrize("x", [torch.tensor(2.5), torch.zeros(0, 4), torch.ones(1, 1)])
def test_scalars_and_empty_tensors(
    x: torch.Tensor, tmp_path: Path, reader: FileReader, tiny_pieces: None
) -> None:
    source = FileSource(write(tmp_path / "m.safetensors", pad=1, x=x)["x"], reader)
    assert_same(read(source, lambda t: t), x)
    assert_same(read(source, lambda t: t, torch.float64), x.double())


def test_the_scratch_stays_small(tmp_path: Path) -> None:
    """A strided range that is larger than what may be held is read in parts."""
    limit = 4 << 10
    x = torch.randn(1, 64, 1 << 10)
    entries = write(tmp_path / "m.safetensors", x=x)
    for view in (lambda t: t[:, :, ::2], lambda t: t.transpose(1, 2), lambda t: t[0].T[::2]):
        reader = FileReader()
        source = FileSource(entries["x"], reader)
        with pytest.MonkeyPatch.context() as patch, AllocatedBytes() as bytes_:
            patch.setattr(reading, "HELD_SPAN_BYTES", limit)
            patch.setattr(reading, "CHUNK_BYTES", limit)
            actual = read(source, view)
        assert_same(actual, view(x))
        assert bytes_.peak_bytes <= actual.nbytes + 2 * limit
        reader.close()


def test_a_size_one_dimension_does_not_hide_the_one_to_split(tmp_path: Path) -> None:
    limit = 4 << 10
    x = torch.randn(64, 1 << 10)
    reader = FileReader()
    source = FileSource(write(tmp_path / "m.safetensors", x=x)["x"], reader)

    def view(t: torch.Tensor) -> torch.Tensor:
        return t.unsqueeze(0)[:, :, ::2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "HELD_SPAN_BYTES", limit)
        assert_same(read(source, view), view(x))
        assert reader._scratch.buffer.numel() <= limit
    reader.close()


def test_the_last_range_is_not_read_again(
    tmp_path: Path, reader: FileReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(6, 6)
    entries = write(tmp_path / "m.safetensors", x=x, y=x + 1)
    source, other = FileSource(entries["x"], reader), FileSource(entries["y"], reader)
    calls = []
    original = FileReader.read
    monkeypatch.setattr(
        FileReader, "read", lambda self, *args: (calls.append(1), original(self, *args))[1]
    )
    read(source, lambda t: t[:, :5])
    count = len(calls)
    read(source, lambda t: t[:, :5])
    assert len(calls) == count
    assert_same(read(other, lambda t: t[:, :5]), (x + 1)[:, :5])
    assert_same(read(source, lambda t: t[:, :5]), x[:, :5])


@pytest.mark.parametrize("view", ["whole", "columns"])
@pytest.mark.parametrize("casts", [(), (torch.float64,)])
def test_a_file_cut_while_it_is_read(
    view: str, casts: Any, tmp_path: Path, reader: FileReader
) -> None:
    path = tmp_path / "m.safetensors"
    source = FileSource(write(path, x=torch.randn(4, 3, 7))["x"], reader)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"m\.safetensors changed while it was being loaded"):
        read(source, VIEWS[view], *casts)


def test_a_file_that_vanished(tmp_path: Path, reader: FileReader) -> None:
    path = tmp_path / "m.safetensors"
    source = FileSource(write(path, x=torch.randn(4, 3))["x"], reader)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        read(source, lambda t: t)


def test_close_frees_everything(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    reader = FileReader()
    source = FileSource(write(path, x=torch.randn(4, 3))["x"], reader)
    read(source, lambda t: t[:, :2])
    assert reader._scratch.buffer.numel()
    assert str(path) in open_files()
    reader.close()
    assert not reader._scratch.buffer.numel()
    assert str(path) not in open_files()
    assert read(source, lambda t: t).shape == (4, 3)  # opens again
    reader.close()


def open_files() -> set[str]:
    links = Path("/proc/self/fd")
    if not links.exists():
        pytest.skip("needs /proc")
    return {str(link.readlink()) for link in links.iterdir() if link.is_symlink()}


def mapped(maps: FileMaps, entry: TensorEntry, view: Callable[[Any], Any]) -> torch.Tensor:
    geometry = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
    return maps.view(entry, view(geometry))


def test_mapped_views_hold_the_values(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {"a": torch.randn(4, 3, 7), "b": torch.randn(5).half(), "c": torch.randn(2).double()}
    save_file(tensors, path)
    maps, entries = FileMaps(), read_header(path)
    for name, tensor in tensors.items():
        assert_same(mapped(maps, entries[name], lambda t: t), tensor)
    for name in ("rows", "transposed", "steps", "one"):
        assert_same(mapped(maps, entries["a"], VIEWS[name]), VIEWS[name](tensors["a"]))


def test_mapped_ties_do_not_alias_and_never_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    x = torch.randn(64, 32)
    save_file({"x": x}, path)
    before, maps, entry = path.read_bytes(), FileMaps(), read_header(path)["x"]
    views = [
        lambda t: t,
        lambda t: t,
        lambda t: t[:, ::2],
        lambda t: t[:, 1::2],
        lambda t: t[3:5].T,
    ]
    tensors = [mapped(maps, entry, view) for view in views]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
        for other, view in list(zip(tensors, views, strict=True))[number + 1 :]:
            assert_same(other, view(x))
    for number, tensor in enumerate(tensors):
        assert (tensor == number).all()
    del tensors, maps
    assert path.read_bytes() == before
    assert_same(load_file(path)["x"], x)


def test_a_mapped_tensor_has_a_storage_of_its_own_size(tmp_path: Path) -> None:
    """Saving it must not save the whole file."""
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.randn(8), "b": torch.randn(8)}, path)
    maps, entries = FileMaps(), read_header(path)
    a, b = (mapped(maps, entries[name], lambda t: t) for name in "ab")
    assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes() == 32


def test_a_mapping_outlives_the_name_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    x = torch.randn(64)
    save_file({"x": x}, path)
    tensor = mapped(FileMaps(), read_header(path)["x"], lambda t: t)
    path.unlink()
    assert_same(tensor, x)


def test_forms_of_views() -> None:
    x = torch.empty(4, 6, device="meta")
    assert is_dense(x)
    assert is_dense(x.T)
    assert is_dense(x[1:3])
    assert is_dense(x[:1].unsqueeze(1))
    assert not is_dense(x[:, :3])
    assert not is_dense(x[:1].expand(4, 6))
    assert has_overlap(x[:1].expand(4, 6))
    assert not has_overlap(x[:1].expand(1, 6))
    assert [span(view) for view in (x, x.T, x[:, :3], x[1:2], x[:0], x[:, :0])] == [
        *(24, 24, 21, 6, 0, 0),
    ]
    assert all(is_dense(view) for view in (x[:0], x[:, :0], x[0, 0]))
    entry = TensorEntry("x", torch.float32, (4, 6), Path("f"), offset=10, nbytes=96)
    assert byte_span(entry, x[:, 6:]) == (10 + 6 * 4, 10 + 6 * 4)
    assert byte_span(entry, x[1:3, 2:4]) == (10 + 8 * 4, 10 + 16 * 4)
