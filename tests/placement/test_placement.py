"""Placing recipes: order, ownership, layout, mapping, and results that wait for their readers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.support.programs import assert_same, in_memory
from tl_fastload.errors import NumbersWarning
from tl_fastload.ground.geometry import copied
from tl_fastload.hooked import layout
from tl_fastload.loading.load import notes_on
from tl_fastload.placement.order import groups
from tl_fastload.placement.placer import Placer
from tl_fastload.placement.rehearsal import forecast
from tl_fastload.recipes.evaluate import rounds_otherwise
from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise
from tl_fastload.report.progress import Progress
from tl_fastload.source.reader import FileMaps, FileReader, FileSource
from tl_fastload.source.safetensors import read_header

CPU = torch.device("cpu")


class Model(nn.Module):
    """Parameters of any names; `layout.forward_strides` wants them contiguous."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.full(shape, -1.0)))


def placer(model: nn.Module, **options: Any) -> Placer:
    values: dict[str, Any] = {"assign": True, "maps": None, "map_any_layout": True, **options}
    return Placer(
        model,
        lambda name: CPU,
        progress=Progress(False),
        strides_of=layout.strides_in,
        **values,
    )


def place(model: nn.Module, recipes: dict[str, Any], **options: Any) -> Placer:
    made = placer(model, **options)
    with made.progress:
        made.place(recipes)
    return made


def own(model: nn.Module) -> dict[str, Promise]:
    """The model's parameters as they are, promised: each one source, as in a real load."""
    named = model.named_parameters()
    return {name: Promise.of(MemorySource(tensor, name)) for name, tensor in named}


@pytest.mark.parametrize("assign", [True, False])
def test_values_arrive(assign: bool) -> None:
    model = Model(a=(4, 6), b=(6, 4), c=(4,))
    before = dict(model.named_parameters())
    x = torch.randn(4, 6)
    (p,) = in_memory([x])
    place(model, {"a": p, "b": p.T, "c": (p * 2).sum(1), "unknown": p}, assign=assign)
    assert_same(model.a.data, x)
    assert_same(model.b.data, x.T)
    assert_same(model.c.data, (x * 2).sum(1))
    for name, parameter in model.named_parameters():
        assert (parameter is before[name]) is not assign
        assert parameter.is_contiguous()
        assert parameter.requires_grad


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("scale", [None, 2])
def test_two_names_of_one_recipe_share_nothing(assign: bool, scale: int | None) -> None:
    model = Model(a=(4, 6), b=(4, 6), c=(2, 6))
    x = torch.randn(4, 6)
    (p,) = in_memory([x])
    value = p if scale is None else p * scale
    before = x.clone()
    place(model, {"a": value, "b": value, "c": value[:2]}, assign=assign)
    expected = model.b.detach().clone()
    with torch.no_grad():
        model.a.fill_(7)
    assert_same(model.b.data, expected)
    assert_same(model.c.data, expected[:2])
    assert_same(x, before)


def test_dtype_and_gradients_of_the_model_win() -> None:
    model = Model(a=(4, 6), b=(6,))
    model.b.requires_grad_(False)
    x = torch.randn(4, 6, dtype=torch.float64)
    (p,) = in_memory([x])
    place(model, {"a": p, "b": p[0]})
    assert model.a.dtype == model.b.dtype == torch.float32
    assert model.a.requires_grad
    assert not model.b.requires_grad
    assert_same(model.a.data, x.float())


def test_a_number_of_shape_one_fits_a_scalar() -> None:
    model = Model(a=())
    place(model, {"a": in_memory([torch.ones(1)])[0]})
    assert_same(model.a.data, torch.tensor(1.0))


def test_a_parameter_that_keeps_its_value_is_left_alone() -> None:
    model = Model(a=(2,), b=(2,))
    a = model.a
    mine = own(model)
    place(model, {"a": mine["a"], "b": mine["b"] + 3})
    assert model.a is a
    assert model.b.tolist() == [2.0, 2.0]


def test_results_wait_until_nobody_reads_what_they_overwrite() -> None:
    model = Model(w=(4, 4), b=(4,), n=(4,))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters(), start=2):
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) + number)
    w, b, n = (getattr(model, name).detach().clone() for name in "wbn")
    mine = own(model)
    recipes = {
        "w": mine["w"] * mine["n"],
        "b": mine["b"] + mine["w"].sum(0) * mine["n"],
        "n": torch.ones_like(mine["n"]),
    }
    for order in (["w", "b", "n"], ["n", "b", "w"], ["b", "n", "w"]):
        with torch.no_grad():
            for name, value in {"w": w, "b": b, "n": n}.items():
                model.get_parameter(name).copy_(value)
        place(model, {name: recipes[name] for name in order}, assign=False)
        assert_same(model.w.data, w * n)
        assert_same(model.b.data, b + w.sum(0) * n)
        assert_same(model.n.data, torch.ones(4))


@pytest.mark.parametrize("scale", [1, 2])
def test_parameters_that_change_places(scale: int) -> None:
    """Each reads what the other overwrites: no order of writing is right without a copy."""
    model = Model(a=(4, 6), b=(4, 6), c=(4, 6))
    values = [torch.randn(4, 6) for _ in range(3)]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)
    a, b, c = (p if scale == 1 else p * scale for p in own(model).values())
    place(model, {"a": b, "b": c, "c": a}, assign=False)
    for parameter, value in zip(model.parameters(), [values[1], values[2], values[0]], strict=True):
        assert_same(parameter.data, value * scale)


def test_part_of_another_parameter() -> None:
    """A view that does not start where the parameter does is a reader of it, too."""
    model = Model(a=(4, 6), b=(2, 6))
    with torch.no_grad():
        model.a.copy_(torch.randn(4, 6))
    value = model.a.detach().clone()
    part = Promise.of(MemorySource(model.a.detach()[2:], "a"))
    place(model, {"a": own(model)["a"] * 2, "b": part}, assign=False)
    assert_same(model.b.data, value[2:])


@pytest.fixture(params=[False, True], ids=["at once", "in the end"])
def asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """When sums are looked at: in the end where a device computes while the thread goes on."""
    if request.param:
        monkeypatch.setattr("tl_fastload.placement.finite._ASYNCHRONOUS", ("cpu",))


@pytest.mark.usefixtures("asked")
def test_what_is_not_finite_is_noted() -> None:
    model = Model(a=(3,), b=(3,), c=(3,), d=(3,))
    tensors = [torch.tensor([1.0, x, 2.0]) for x in (float("nan"), float("inf"), 3e38, 0.0)]
    tensors[2][0] = 3e38  # a sum that overflows, of finite numbers
    recipes = dict(zip("abcd", in_memory(tensors), strict=True))
    assert sorted(place(model, recipes).not_finite) == ["a", "b"]


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), None])
def test_what_is_not_finite_in_every_dtype(dtype: torch.dtype, bad: float | None) -> None:
    model = Model(a=(4, 500)).to(dtype)
    x = torch.full((4, 500), torch.finfo(dtype).max, dtype=dtype)
    if bad is not None:
        x[2, 33] = bad
    assert place(model, {"a": in_memory([x])[0]}).not_finite == ([] if bad is None else ["a"])


def test_the_order_is_largest_first_with_small_readers_before() -> None:
    big, small = in_memory([torch.randn(64, 64), torch.randn(8, 8)])
    recipes = {"b": big.sum(0), "s": small, "t": small.sum(0), "w": big * 2}
    assert groups(recipes) == [["b", "w"], ["s", "t"]]


def test_every_name_is_in_one_group() -> None:
    tensors = in_memory([torch.randn(size, 16) for size in (64, 32, 16, 2)])
    recipes = {
        f"{i}{j}": a[: j + 1] + b[:1] for i, a in enumerate(tensors) for j, b in enumerate(tensors)
    }
    names = [name for group in groups(recipes) for name in group]
    assert sorted(names) == sorted(recipes)


def from_file(
    path: Path, tensors: dict[str, torch.Tensor], reader: FileReader
) -> dict[str, Promise]:
    save_file(tensors, path)
    entries = read_header(path).items()
    return {name: Promise.of(FileSource(entry, reader)) for name, entry in entries}


def test_unchanged_parameters_are_mapped(tmp_path: Path) -> None:
    reader = FileReader()
    tensors = {"a": torch.randn(4, 6), "b": torch.randn(6)}
    recipes = from_file(tmp_path / "m.safetensors", tensors, reader)
    before = (tmp_path / "m.safetensors").read_bytes()
    model = Model(a=(4, 6), b=(6,), c=(6, 4), d=(4, 6), e=(4, 6), f=(2, 4, 6))
    a, b = recipes["a"], recipes["b"]
    more = {"c": a.T, "d": a * 2, "e": b.expand(4, 6), "f": a.to(torch.float16).expand(2, 4, 6)}
    made = place(model, {**recipes, **more}, maps=FileMaps())
    assert made.mapped_bytes == sum(getattr(model, name).nbytes for name in "abc")
    assert_same(model.a.data, tensors["a"])
    assert_same(model.c.data, tensors["a"].T)
    assert_same(model.e.data, tensors["b"].expand(4, 6))
    for name, parameter in model.named_parameters():
        others = {n: p.detach().clone() for n, p in model.named_parameters() if n != name}
        with torch.no_grad():
            parameter.fill_(9)
        assert (parameter == 9).all()
        for other, value in others.items():
            assert_same(model.get_parameter(other).data, value)
    assert (tmp_path / "m.safetensors").read_bytes() == before
    reader.close()


def test_data_at_an_odd_offset_is_read_instead(tmp_path: Path) -> None:
    path, reader = tmp_path / "m.safetensors", FileReader()
    x = torch.randn(4, 6)
    save_file({"a": x}, path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    path.write_bytes(
        (size + 1).to_bytes(8, "little") + content[8 : 8 + size] + b" " + content[8 + size :]
    )
    model = Model(a=(4, 6))
    recipe = Promise.of(FileSource(read_header(path)["a"], reader))
    made = place(model, {"a": recipe}, maps=FileMaps())
    assert made.mapped_bytes == 0
    assert_same(model.a.data, x)
    reader.close()


def test_another_layout_is_mapped_only_if_any_will_do(tmp_path: Path) -> None:
    reader = FileReader()
    tensors = {"x": torch.randn(4, 6)}
    recipes = from_file(tmp_path / "m.safetensors", tensors, reader)
    for any_layout, mapped in ((True, 96), (False, 0)):
        model = Model(a=(6, 4))
        made = place(model, {"a": recipes["x"].T}, maps=FileMaps(), map_any_layout=any_layout)
        assert made.mapped_bytes == mapped
        predicted = forecast(made, {"a": recipes["x"].T})
        assert predicted.peak_bytes == ({} if mapped else {CPU: 192})  # read, then transposed
        assert predicted.held_bytes == ({} if mapped else {"a": 96})
        assert predicted.mapped_bytes == ({"a": 96} if mapped else {})
        assert_same(model.a.data, tensors["x"].T)
        assert model.a.is_contiguous() is not any_layout
    reader.close()


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (2, 3, 4, 5), (7,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_in_any_memory_order(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape)
    dims = len(shape)
    for first in range(max(dims, 1)):
        order = [(i + first) % dims for i in range(dims)]
        strides = torch.empty([shape[i] for i in order]).permute(
            [order.index(i) for i in range(dims)]
        )
        for source in (x, x.mT.contiguous().mT if dims > 1 else x):
            copy = copied(source, strides.stride(), dtype)
            assert copy.stride() == strides.stride()
            assert_same(copy, x.to(dtype))
            assert copy.data_ptr() != source.data_ptr()


def test_sums_on_another_device_than_recorded_are_told_of() -> None:
    meta, cuda = torch.device("meta"), torch.device("cuda:0")
    model = Model(plain=(4, 6), centred=(4, 6), product=(4, 4), there=(4, 6), factor=(4, 4))
    (p,) = in_memory([torch.randn(4, 6)])
    on_device = Promise(p.node, p.meta, cuda)
    recipes = {
        "plain": p * 2,
        "centred": p - p.mean(0),
        "product": p @ p.T,
        "there": on_device - on_device.mean(0),
        "factor": on_device @ on_device.T,
    }
    assert place(model, dict(recipes)).rounded_otherwise == ["there", "factor"]
    made = placer(model)
    made.device_of = lambda name: meta
    with made.progress:
        made.place(dict(recipes))
    assert sorted(made.rounded_otherwise) == ["centred", "factor", "there"]
    for name, found in (("there", False), ("factor", True), ("centred", True)):
        assert rounds_otherwise(recipes[name].node, recipes[name].device, cuda) is found
    with pytest.warns(NumbersWarning, match=r"there.* another device than TransformerLens"):
        assert len(notes_on(made, SimpleNamespace(moves_first=False))) == 1  # type: ignore[arg-type]
    assert notes_on(made, SimpleNamespace(moves_first=True)) == []  # type: ignore[arg-type]
