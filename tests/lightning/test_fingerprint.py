"""A few values of each parameter: what counts as the same weights, and what does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tl_fastload.ground.wrappers import plain_name
from tl_fastload.lightning.fingerprint import differing, fingerprint
from tl_fastload.quantized import quantize

Tensors = dict[str, torch.Tensor]


def tensors(dtype: torch.dtype = torch.float32) -> Tensors:
    made = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"W": (64, 96), "b": (96,), "E": (3, 8, 16), "s": ()}
    return {name: torch.randn(shape, generator=made).to(dtype) for name, shape in shapes.items()}


def changed(before: Tensors, **new: Any) -> Tensors:
    return {**before, **new}


def test_it_is_small_and_loads_with_weights_only(tmp_path: Any) -> None:
    found = fingerprint(tensors())
    assert found["values"].shape == (3 * 16 + 1,)
    torch.save(found, tmp_path / "a.pt")
    assert differing(torch.load(tmp_path / "a.pt", weights_only=True), found) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    plain = tensors(dtype)
    transposed = changed(plain, W=plain["W"].T.contiguous().T)
    assert transposed["W"].stride() != plain["W"].stride()
    assert torch.equal(fingerprint(plain)["values"], fingerprint(transposed)["values"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_difference(dtype: torch.dtype) -> None:
    before = {name: value.double() for name, value in tensors().items()}
    after = {name: value * (1 + 1e-7) for name, value in before.items()}
    one, other = (
        fingerprint({name: value.to(dtype) for name, value in found.items()})
        for found in (before, after)
    )
    assert differing(one, other) == []


def test_noise_where_nothing_should_be() -> None:
    before = changed(tensors(), b=torch.full((96,), 1e-9))
    assert differing(fingerprint(before), fingerprint(changed(before, b=-before["b"]))) == []


def test_one_value_rounded_the_other_way() -> None:
    before = {f"W{i}": value for i in range(4) for value in [tensors(torch.bfloat16)["W"]]}
    one, other = fingerprint(before), fingerprint(before)
    other["values"] = other["values"].clone()
    other["values"][5] *= 1 + 2**-7
    assert differing(one, other) == ["W0"]  # one in 64
    many = {f"W{i}": before["W0"] for i in range(8)}
    one, other = fingerprint(many), fingerprint(many)
    other["values"] = other["values"].clone()
    other["values"][5] *= 1 + 2**-7
    assert differing(one, other) == []  # one in 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3e-3, 1.0])
def test_a_small_change_everywhere(dtype: torch.dtype, size: float) -> None:
    before = tensors()
    after = {name: value + size * torch.randn_like(value) for name, value in before.items()}
    one, other = (
        fingerprint({name: value.to(dtype) for name, value in found.items()})
        for found in (before, after)
    )
    assert "W" in differing(one, other)


@pytest.mark.parametrize("name", ["W", "b", "E", "s"])
def test_a_change_of_one_parameter(name: str) -> None:
    before = tensors()
    after = changed(before, **{name: before[name] * 1.01})
    assert differing(fingerprint(before), fingerprint(after)) == [name]


def test_names_and_shapes() -> None:
    before = tensors()
    fewer = {name: value for name, value in before.items() if name != "b"}
    assert differing(fingerprint(before), fingerprint(fewer)) == ["b"]
    assert differing(fingerprint(fewer), fingerprint(before)) == ["b"]
    turned = changed(before, W=before["W"].T)
    assert differing(fingerprint(before), fingerprint(turned)) == ["W"]


def test_nan_infinity_and_nothing_at_all() -> None:
    odd = {"W": torch.full((4, 4), float("nan")), "b": torch.full((3,), float("inf"))}
    assert differing(fingerprint(odd), fingerprint(odd)) == []
    assert differing(fingerprint({}), fingerprint({})) == []
    empty = {"W": torch.empty(0, 4)}
    assert differing(fingerprint(empty), fingerprint(empty)) == []
    assert differing(fingerprint(odd), fingerprint(changed(odd, b=torch.ones(3)))) == ["b"]


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_the_coarser_dtype_decides(saved: torch.dtype) -> None:
    here = torch.float32 if saved == torch.bfloat16 else torch.bfloat16
    one, other = (
        fingerprint({n: v.to(dtype) for n, v in tensors().items()}) for dtype in (saved, here)
    )
    assert differing(one, other) == []


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_bytes(kind: str) -> None:
    dense = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    one = fingerprint({"W": quantize(dense, kind)})
    assert all(name.startswith("W:") for name in one["shapes"])
    assert differing(one, fingerprint({"W": quantize(dense, kind)})) == []
    assert differing(one, fingerprint({"W": quantize(dense.flip(0), kind)}))
    other = fingerprint({"W": quantize(dense, "fp4")})
    assert differing(one, other)


def test_plain_names() -> None:
    assert plain_name("a._orig_mod.b.W") == "a.b.W"
    assert plain_name("_orig_mod") == ""
    assert plain_name("a.not_orig_mod.W") == "a.not_orig_mod.W"
