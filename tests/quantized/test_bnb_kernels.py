"""The kernels against bitsandbytes' own layers, bit for bit. Real bitsandbytes on the CPU."""

from __future__ import annotations

import ast
import copy
import itertools
import logging
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F

import tl_fastload
from tests.support.quantized_kinds import four_bit_bytes, int8_bytes, layer_4bit, layer_8bit
from tl_fastload.errors import QuantizationError
from tl_fastload.quantized import quantize as quantized_tensor
from tl_fastload.quantized.formats import bitsandbytes_kernels as kernels
from tl_fastload.quantized.formats.bitsandbytes import BitsAndBytes
from tl_fastload.quantized.formats.bitsandbytes_bytes import FourBitBytes, Int8Bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# bitsandbytes compiles what dequantizes large blocks on AVX-512 CPUs: half a minute.
EVERY_BLOCK_SIZE = [
    pytest.param(size, marks=[pytest.mark.slow] if size >= 2048 else [])
    for size in kernels.BLOCKSIZES
]
FOUR_BIT = list(itertools.product(("nf4", "fp4"), (False, True), (64, 128)))


def _dense(out: int = 48, columns: int = 128) -> torch.Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5


def quantize(dense: torch.Tensor, kind: str, **settings: Any) -> Any:
    """The bytes of a quantized matrix."""
    return quantized_tensor(dense, kind, **settings).content.stored


def _activations(*shape: int, outliers: bool = False) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    if outliers:
        x[..., 3] *= 30
        x[..., 40] *= 30
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("shape", [(2, 5, 128), (7, 128), (1, 1, 128)])
def test_int8_product_is_that_of_the_layer(
    dtype: torch.dtype, outliers: bool, threshold: float, shape: tuple[int, ...]
) -> None:
    layer = layer_8bit(_dense(), threshold, bias=True)
    stored = int8_bytes(layer)
    x = _activations(*shape, outliers=outliers).to(dtype)
    found = stored.linear(x, layer.bias.detach().clone())
    assert found.dtype == dtype
    assert torch.equal(found, layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_say_nothing_of_casts(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """bitsandbytes logs a line each time, which floods notebooks; its own layers still do."""
    layer, x = layer_8bit(_dense()), _activations(4, 128).to(dtype)
    stored = int8_bytes(layer)
    log = logging.getLogger("bitsandbytes.autograd._functions")
    filters = list(log.filters)
    caplog.set_level(logging.INFO, log.name)  # whatever the command line has set before
    stored.linear(x)
    assert caplog.records == []
    layer(x)
    assert [record.getMessage()[:14] for record in caplog.records] == ["MatMul8bitLt: "]
    assert log.filters == filters


@pytest.mark.parametrize(("kind", "double_quant", "blocksize"), FOUR_BIT)
@pytest.mark.parametrize("compute_dtype", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_product_is_that_of_the_layer(
    kind: str, double_quant: bool, blocksize: int, compute_dtype: Any, dtype: torch.dtype
) -> None:
    layer = layer_4bit(_dense(), kind, double_quant, blocksize, compute_dtype, bias=True)
    stored = four_bit_bytes(layer)
    assert BitsAndBytes().of_layer(layer)[1] == compute_dtype  # type: ignore[index]
    bias = layer.bias.detach().clone()
    for x in (_activations(2, 5, 128).to(dtype), _activations(1, 128).to(dtype)):
        found = stored.linear(x, bias, compute_dtype)
        assert found.dtype == dtype
        assert torch.equal(found, layer(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_dequantizes_as_transformers_does(dtype: torch.dtype) -> None:
    layer = layer_8bit(_dense())
    expected = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    stored = int8_bytes(layer)
    assert torch.equal(stored.dense(dtype), expected.to(dtype))


@pytest.mark.parametrize(("kind", "double_quant", "blocksize"), FOUR_BIT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_dequantizes_as_transformers_does(
    kind: str, double_quant: bool, blocksize: int, dtype: torch.dtype
) -> None:
    layer = layer_4bit(_dense().to(dtype), kind, double_quant, blocksize)
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    found = four_bit_bytes(layer).dense(dtype)
    assert expected.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("blocksize", EVERY_BLOCK_SIZE)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_block_size(kind: str, double_quant: bool, blocksize: int) -> None:
    """The bytes, the product and a part of the rows, in rows of one and of several blocks."""
    for columns in (blocksize, max(blocksize, 4096)):
        dense = _dense(12, columns)
        layer = layer_4bit(dense, kind, double_quant, blocksize)
        theirs = four_bit_bytes(layer)
        stored = quantize(dense, kind, blocksize=blocksize, double_quant=double_quant)
        assert theirs.blocksize == blocksize
        for name, tensor in theirs.tensors().items():
            assert torch.equal(stored.tensors()[name], tensor), name
        x = _activations(3, columns)
        assert torch.equal(stored.linear(x), layer(x))
        values = stored.dense(torch.float32)
        assert (values - dense).norm() < 0.2 * dense.norm()
        some = stored.rows(torch.tensor([7, 8, 2]))
        assert torch.equal(some.dense(torch.float32), values[[7, 8, 2]])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("columns", [32, 63, 96, 100, 128])
def test_rows_that_are_not_whole_blocks(kind: str, blocksize: int, columns: int) -> None:
    """bitsandbytes' CPU kernel misreads them, in its own layers too; ours do not."""
    dense = _dense(10, columns)
    stored = quantize(dense, kind, blocksize=blocksize)
    assert isinstance(stored, FourBitBytes)
    high, low = stored.packed.flatten() >> 4, stored.packed.flatten() & 15
    values = stored.code[torch.stack([high, low], 1).flatten().long()]
    scales = stored.absmax.repeat_interleave(blocksize)[: dense.numel()]
    expected = (values * scales).reshape(dense.shape)
    assert (expected - dense).norm() < 0.15 * dense.norm()
    assert torch.equal(stored.dense(torch.float32), expected)
    x, bias = _activations(3, columns), _activations(10)
    assert torch.equal(stored.linear(x, bias), F.linear(x, expected, bias))


def test_block_scales_are_bitsandbytes_own() -> None:
    state = layer_4bit(_dense(96), "nf4", double_quant=True).weight.quant_state
    expected = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    stored = FourBitBytes(**kernels.fields_of(torch.zeros(96 * 64, 1, dtype=torch.uint8), state))
    assert torch.equal(stored.block_scales(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_quantizes_as_bitsandbytes_does(dtype: torch.dtype) -> None:
    dense = _dense().to(dtype)
    kept = dense.clone()
    stored = quantize(dense, "int8")
    weight = layer_8bit(dense).weight
    assert isinstance(stored, Int8Bytes)
    assert torch.equal(stored.codes, weight.data)
    assert torch.equal(stored.scales, weight.SCB)
    assert torch.equal(dense, kept)


@pytest.mark.parametrize(("kind", "double_quant", "blocksize"), FOUR_BIT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_quantizes_as_bitsandbytes_does(
    kind: str, double_quant: bool, blocksize: int, dtype: torch.dtype
) -> None:
    dense = _dense().to(dtype)
    stored = quantize(dense, kind, blocksize=blocksize, double_quant=double_quant)
    weight = layer_4bit(dense, kind, double_quant, blocksize).weight
    expected = four_bit_bytes(weight)
    assert isinstance(stored, FourBitBytes)
    assert stored.plain() == expected.plain()
    assert stored.is_nested == double_quant
    for name, tensor in expected.tensors().items():
        assert torch.equal(stored.tensors()[name], tensor), name


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("where", ["side", "null"])
def test_a_device_quantizes_between_what_comes_before_and_after_in_the_callers_stream(
    monkeypatch: pytest.MonkeyPatch, kind: str, where: str
) -> None:
    done: list[Any] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            done.append((self.name, "waits for", other.name))

    @contextmanager
    def stream(found: Stream) -> Iterator[None]:
        before, current[0] = current[0], found
        yield
        current[0] = before

    null = Stream("null")
    current = [null if where == "null" else Stream("side")]
    guard, device = kernels._in_null_stream, torch.device("cuda:1")
    monkeypatch.setattr(kernels, "_in_null_stream", lambda _: guard(device))
    monkeypatch.setattr(torch.cuda, "default_stream", {device: null}.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda x, s: done.append((x.dtype, s.name)), raising=False
    )
    for name in ("quantize_4bit", "quantize_blockwise", "int8_vectorwise_quant"):
        theirs: Any = getattr(bnb.functional, name)

        def quantize(*args: Any, theirs: Any = theirs, **kwargs: Any) -> Any:
            done.append(current[0].name)
            return theirs(*args, **kwargs)

        monkeypatch.setattr(bnb.functional, name, quantize)
    settings = {} if kind == "int8" else {"double_quant": True}
    quantized_tensor(torch.randn(8, 64), kind, **settings)
    if where == "null":
        assert set(done) == {"null"}
        return
    first, *between, after = [one for one in done if not isinstance(one, tuple) or len(one) > 2]
    assert first == ("null", "waits for", "side")
    assert set(between) == {"null"}
    assert after == ("side", "waits for", "null")
    kept = (
        [torch.int8, torch.float32] if kind == "int8" else [torch.uint8] * 2 + [torch.float32] * 4
    )
    used = [one[0] for one in done[done.index(after) + 1 :]]
    assert sorted(used, key=str) == sorted(kept, key=str)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_gradient_is_that_through_the_dequantized_weight(kind: str) -> None:
    stored = quantize(_dense(), kind, double_quant=True)
    dense = stored.dense(torch.float32)
    upstream = _activations(2, 5, 48)
    x = _activations(2, 5, 128, outliers=True).requires_grad_(True)
    bias = torch.zeros(48, requires_grad=True)
    found = torch.autograd.grad(stored.linear(x, bias), (x, bias), upstream)
    expected = torch.autograd.grad(F.linear(x, dense, bias), (x, bias), upstream)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_no_activations_are_no_error(kind: str) -> None:
    stored = quantize(_dense(), kind)
    x = torch.zeros(0, 128, requires_grad=True)
    product = stored.linear(x, torch.zeros(48))
    assert product.shape == (0, 48)
    product.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_double_precision_activations(kind: str) -> None:
    """bitsandbytes' 4-bit kernel returns uninitialised memory in this dtype."""
    stored = quantize(_dense(), kind)
    x = _activations(4, 128)
    found = stored.linear(x.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), stored.linear(x), rtol=1e-4, atol=1e-5)
    dense = stored.dense(torch.float64)
    assert torch.equal(dense.float(), stored.dense(torch.float32))


def test_int8_bytes_are_shared_before_and_after_the_first_forward_pass() -> None:
    layer = layer_8bit(_dense(), threshold=3.0)
    before = int8_bytes(layer)
    layer(_activations(1, 128))
    after = int8_bytes(layer)
    for stored in (before, after):
        assert stored.codes.data_ptr() == layer.weight.data.data_ptr()
        assert stored.scales.data_ptr() == layer.state.SCB.data_ptr()
        assert stored.threshold == 3.0
        assert type(stored.codes) is torch.Tensor
    assert int8_bytes(layer_8bit(_dense()).weight).threshold == 6.0


def test_4bit_bytes_are_shared() -> None:
    layer = layer_4bit(_dense(), "nf4", double_quant=True)
    for source in (layer, layer.weight):
        stored = four_bit_bytes(source)
        state = layer.weight.quant_state
        assert stored.packed.data_ptr() == layer.weight.data.data_ptr()
        assert stored.absmax.data_ptr() == state.absmax.data_ptr()
        assert stored.nested_absmax is not None
        assert stored.nested_absmax.data_ptr() == state.state2.absmax.data_ptr()


def test_4bit_bytes_stored_in_another_dtype() -> None:
    weight = bnb.nn.Params4bit(
        _dense(), requires_grad=False, quant_type="nf4", quant_storage=torch.bfloat16
    ).to("cpu")
    stored = four_bit_bytes(weight)
    plain = quantize(_dense(), "nf4", double_quant=True)
    assert stored.packed.data_ptr() == weight.data.data_ptr()
    assert torch.equal(stored.packed, plain.tensors()["packed"])


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="needs an AVX-512 CPU")
@pytest.mark.parametrize("double_quant", [False, True])
def test_layer_repacked_for_avx512(double_quant: bool) -> None:
    """bitsandbytes re-orders a layer when it first runs; what was taken before must not notice."""
    dense = _dense(64)
    layer = layer_4bit(dense, "nf4", double_quant, avx512=True)
    before = four_bit_bytes(layer)
    values = before.dense(torch.float32)
    layer(_activations(1, 128))
    assert layer.weight.quant_state.packing_format_for_cpu
    assert torch.equal(before.dense(torch.float32), values)

    state = copy.deepcopy(layer.weight.quant_state)
    after = four_bit_bytes(layer)
    assert torch.equal(after.packed, before.packed)
    assert torch.equal(after.absmax, before.block_scales().bfloat16().float())
    assert layer.weight.quant_state.packing_format_for_cpu
    assert torch.equal(layer.weight.quant_state.absmax, state.absmax)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False), "not quantized yet"),
        (lambda: bnb.nn.Linear8bitLt(8, 8).to("cpu"), "has_fp16_weight"),
        (lambda: bnb.nn.Int8Params(torch.zeros(8, 8, dtype=torch.int8), False), "SCB"),
        (
            lambda: bnb.nn.Int8Params(
                torch.zeros(8, 8, dtype=torch.int8), False, SCB=torch.ones(7)
            ),
            "8 in all",
        ),
    ],
)
def test_8bit_layers_that_cannot_be_read(source: Any, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        int8_bytes(source())


def test_4bit_layers_that_cannot_be_read() -> None:
    with pytest.raises(QuantizationError, match="quant_state"):
        four_bit_bytes(bnb.nn.Linear4bit(64, 8))
    layer = layer_4bit(_dense())
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax[:-1]
    with pytest.raises(QuantizationError, match="absmax"):
        four_bit_bytes(layer)


@pytest.mark.parametrize(
    ("dense", "kind", "options", "message"),
    [
        (torch.zeros(4, 64), "int4", {}, r"'int8', 'nf4', 'fp4', .*not 'int4'"),
        (torch.zeros(4, 64), "nf4", {"blocksize": 48}, "block size 48"),
        (torch.zeros(2, 4, 64), "nf4", {}, "matrix"),
        (torch.zeros(4, 64, dtype=torch.int8), "nf4", {}, "floating point"),
        (torch.full((4, 64), 1e6), "int8", {}, "beyond float16"),
    ],
)
def test_what_cannot_be_quantized(
    dense: torch.Tensor, kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize(dense, kind, **options)


def test_a_device_without_kernels() -> None:
    with pytest.raises(QuantizationError, match="no kernels for device meta"):
        kernels.require_device(torch.device("meta"))


@pytest.fixture
def _fresh_import() -> Iterator[None]:
    kernels.bitsandbytes.cache_clear()
    yield
    kernels.bitsandbytes.cache_clear()


@pytest.mark.usefixtures("_fresh_import")
def test_missing_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(QuantizationError, match="pip install"):
        quantize(_dense(), "nf4")


@pytest.mark.usefixtures("_fresh_import")
def test_old_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb, "__version__", "0.42.0")
    with pytest.raises(QuantizationError, match="too old"):
        quantize(_dense(), "nf4")


def test_only_one_module_imports_bitsandbytes_and_only_when_used() -> None:
    importers = set()
    for path in Path(tl_fastload.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "bitsandbytes" for name in names):
                importers.add(path.name)
                assert node not in tree.body
    assert importers == {"bitsandbytes_kernels.py"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_bytes_are_the_same_however_large_the_parts(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts, as on the CPU, and whole, as on a device, where the parts are larger."""
    dense = _dense(out=70, columns=128).to(dtype)
    before = dense.clone()
    monkeypatch.setattr(kernels, "_PART_SIZE", 1 << 10)
    in_parts = quantize(dense, kind).tensors()
    monkeypatch.setattr(kernels, "_PART_SIZE", kernels._PART_SIZE_ON_DEVICES)
    whole = quantize(dense, kind).tensors()
    assert in_parts.keys() == whole.keys()
    assert all(torch.equal(part, whole[name]) for name, part in in_parts.items())
    assert torch.equal(dense, before)


def test_parts_are_larger_on_a_device() -> None:
    shape = (14336, 4096)  # of an 8B's MLP
    assert len(kernels._parts(torch.empty(shape, device="meta"))) == 4
    assert len(kernels._parts(torch.empty(1, device="cpu").expand(shape))) == 224


def test_int8_of_an_older_bitsandbytes_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = _dense()
    expected = kernels.quantize_int8(dense)
    functional = types.SimpleNamespace()  # it quantized by moving the parameter only
    older = types.SimpleNamespace(functional=functional, nn=bnb.nn)
    monkeypatch.setattr(kernels, "bitsandbytes", lambda: older)
    monkeypatch.setattr(kernels, "require_device", lambda device: None)
    assert all(map(torch.equal, kernels.quantize_int8(dense), expected))
