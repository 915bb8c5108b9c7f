"""bitsandbytes' kernels on quantized bytes: the only import of bitsandbytes, made at first use.

What is called `stored` here is an `Int8Bytes` or a `FourBitBytes`, whose module imports this one.

Each product is what the layers of bitsandbytes compute from the same bytes, bit for bit:
`Linear8bitLt.forward` in evaluation mode, and `Linear4bit.forward` without its AVX-512 shortcut,
which rounds weights and scales to bfloat16.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from tl_fastload.errors import QuantizationError
from tl_fastload.ground.borrow import SILENT, Silent, borrow
from tl_fastload.ground.own_defaults import own_defaults

OLDEST_BITSANDBYTES = (0, 43)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# Values that are quantized at a time: the CPU code of older bitsandbytes holds 16 numbers for each.
_PART_SIZE = 1 << 18
_PART_SIZE_ON_DEVICES = 1 << 24  # whole matrices, mostly: each part starts a few kernels

# What the 4-bit kernels multiply in; bitsandbytes returns uninitialised memory for others.
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# The values of bitsandbytes' 4-bit types, float32. Its kernels have them built in.
_CODES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
        *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
        *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
    ),
}


@functools.cache
def bitsandbytes() -> Any:
    """The bitsandbytes module.

    Raises:
        QuantizationError: it is missing, broken or too old.
    """
    try:
        import bitsandbytes as bnb
    except Exception as error:
        raise QuantizationError(
            f"Quantized weights need bitsandbytes, which cannot be imported here ({error}): "
            'pip install "bitsandbytes>=0.43".'
        ) from error
    found = tuple(int(part) for part in bnb.__version__.split(".")[:2])
    if found < OLDEST_BITSANDBYTES:
        raise QuantizationError(
            f"bitsandbytes {bnb.__version__} is too old for quantized weights: "
            'pip install --upgrade "bitsandbytes>=0.43".'
        )
    return bnb


def require_device(device: torch.device) -> None:
    """Check that bitsandbytes has kernels for a device.

    Raises:
        QuantizationError: it has none, or bitsandbytes is missing or too old.
    """
    bnb = bitsandbytes()
    # Versions that do not say are those that had kernels for CUDA only.
    supported = {str(name) for name in getattr(bnb, "supported_torch_devices", {"cuda"})}
    if device.type not in supported:
        raise QuantizationError(
            f"bitsandbytes {bnb.__version__} has no kernels for device {device}, only for "
            f"{', '.join(sorted(supported))}. Use one of these devices, a newer bitsandbytes, or "
            f"unquantized weights."
        )


def linear_int8(stored: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ W.T + bias` for x [n, in], n > 0, rounded to float16 by the kernel; in x's dtype."""
    bnb = bitsandbytes()
    state = bnb.MatmulLtState()
    state.CB, state.SCB = stored.codes, stored.scales
    state.threshold = stored.threshold
    state.has_fp16_weights = False
    state.is_training = False
    state.use_pool = stored.threshold > 0
    bias = None if bias is None else bias.to(x.dtype)
    if x.dtype == torch.float16 and stored.threshold > 0:
        # bitsandbytes blanks outliers in what it is given and puts them back (on the CPU), which
        # autograd would take for a change of the caller's tensor.
        x = x.clone()
    product: torch.Tensor = _matmul_int8()(x, stored.codes, bias=bias, state=state)
    return product


@functools.cache
def _matmul_int8() -> Any:
    """bitsandbytes' 8-bit product without the line that it logs each time of what is not float16;
    the caller's own layers say it still.
    """
    functions: Any = importlib.import_module("bitsandbytes.autograd._functions")
    product = functions.MatMul8bitLt
    silent = {**SILENT, "logger": Silent(getattr(functions, "logger", None))}
    forward = staticmethod(borrow(product.forward, **silent))
    quiet = type(product.__name__, (product,), {"forward": forward, "__module__": __name__})
    return borrow(bitsandbytes().matmul, MatMul8bitLt=quiet)


def linear_4bit(
    stored: Any, x: torch.Tensor, bias: torch.Tensor | None, compute_dtype: torch.dtype | None
) -> torch.Tensor:
    """`x @ W.T + bias` for x [n, in], n > 0, multiplied in `compute_dtype`; in x's dtype."""
    bnb = bitsandbytes()
    dtype = compute_dtype or x.dtype
    if dtype not in _KERNEL_DTYPES:
        dtype = torch.float32
    bias = None if bias is None else bias.to(dtype)
    if _is_misread(stored):
        return F.linear(x.to(dtype), dequantize_4bit(stored, dtype), bias).to(x.dtype)
    # bitsandbytes multiplies by the weights in `dtype`, but differentiates through those of the
    # state's dtype.
    state = _quant_state(stored, dtype)
    product: torch.Tensor = bnb.matmul_4bit(
        x.to(dtype), stored.packed.t(), bias=bias, quant_state=state
    )
    return product.to(x.dtype)


def dequantize_4bit(stored: Any, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in] that the kernel multiplies by: bitsandbytes' own numbers."""
    direct = dtype if dtype in _KERNEL_DTYPES else torch.float32
    state = _quant_state(stored, direct)
    if _is_misread(stored):
        state.shape = torch.Size((1, stored.shape[0] * stored.shape[1]))
    values: torch.Tensor = bitsandbytes().functional.dequantize_4bit(stored.packed, state)
    return values.reshape(stored.shape).to(dtype)


def _is_misread(stored: Any) -> bool:
    # On AVX-512 CPUs bitsandbytes (0.50) starts each row in a block of its own, which is wrong
    # unless rows are whole numbers of blocks. Of a single long row it makes the right values.
    return bool(stored.device.type == "cpu" and stored.shape[1] % stored.blocksize != 0)


def _quant_state(stored: Any, dtype: torch.dtype) -> Any:
    bnb = bitsandbytes()
    options = {
        "shape": torch.Size(stored.shape),
        "code": stored.code,
        "blocksize": stored.blocksize,
        "quant_type": stored.quant_type,
        "dtype": dtype,
    }
    # The kernels only know groups of 256 scales; of other groups they get the scales themselves.
    if not stored.is_nested or stored.nested_blocksize != 256:
        return bnb.functional.QuantState(absmax=stored.block_scales(), **options)
    nested = bnb.functional.QuantState(
        absmax=stored.nested_absmax, code=stored.nested_code, blocksize=256, dtype=torch.float32
    )
    return bnb.functional.QuantState(
        absmax=stored.absmax, offset=stored.nested_offset, state2=nested, **options
    )


def _parts(dense: torch.Tensor, blocksize: int = 1) -> list[slice]:
    """Runs of rows that are whole numbers of blocks: bitsandbytes needs a few copies of what it
    quantizes, so it gets a part at a time.
    """
    rows, columns = dense.shape
    size = _PART_SIZE if dense.device.type == "cpu" else _PART_SIZE_ON_DEVICES
    step = max(1, size // max(columns, 1))
    if columns % blocksize:
        step = -(-step // blocksize) * blocksize
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]


@contextmanager
def _in_null_stream(device: torch.device) -> Iterator[list[torch.Tensor]]:
    """Work in the stream in which bitsandbytes quantizes blocks whatever the current one is; the
    side streams of torch do not wait for it by themselves.

    Yields:
        A list for what is made inside and used after it.
    """
    made: list[torch.Tensor] = []
    here: Any = None
    null: Any = None
    if device.type == "cuda":
        here, null = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    if here == null:
        yield made
        return
    null.wait_stream(here)
    try:
        with torch.cuda.stream(null):
            yield made
    finally:
        here.wait_stream(null)
        for tensor in made:
            tensor.record_stream(here)


@own_defaults()
def quantize_int8(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a matrix [out, in], on its device.

    Raises:
        QuantizationError: values that int8 cannot scale.
    """
    require_device(dense.device)
    dense = dense.detach()
    with _in_null_stream(dense.device) as made:
        codes = torch.empty(dense.shape, dtype=torch.int8, device=dense.device)
        scales = torch.empty(dense.shape[0], dtype=torch.float32, device=dense.device)
        for part in _parts(dense):
            codes[part], scales[part] = _int8_rows(dense[part])
        made += [codes, scales]
    if not bool(torch.isfinite(scales).all()):
        raise QuantizationError(
            "the matrix has values beyond float16, which int8 quantization goes through. Quantize "
            "to 'nf4' or 'fp4'."
        )
    return codes, scales


def _int8_rows(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as an `Int8Params` gets them when it is moved to the device."""
    functional = bitsandbytes().functional
    # A copy: on the CPU bitsandbytes would hold on to, or write into, what it is given.
    if hasattr(functional, "int8_vectorwise_quant"):
        rows = dense.to(torch.float16, copy=True, memory_format=torch.contiguous_format)
        return functional.int8_vectorwise_quant(rows)[:2]  # type: ignore[no-any-return]
    rows = dense.cpu().clone(memory_format=torch.contiguous_format)  # it is quantized by moving it
    parameter = bitsandbytes().nn.Int8Params(rows, requires_grad=False).to(dense.device)
    return parameter.data, parameter.SCB


@own_defaults()
def quantize_4bit(
    dense: torch.Tensor, kind: str, blocksize: int, double_quant: bool
) -> dict[str, Any]:
    """The fields of `FourBitBytes` for a matrix [out, in], on its device.

    Raises:
        QuantizationError: not a block size of bitsandbytes.
    """
    require_device(dense.device)
    if blocksize not in BLOCKSIZES:
        raise QuantizationError(f"block size {blocksize} is not one of {list(BLOCKSIZES)}.")
    with _in_null_stream(dense.device) as made:
        fields = _blocks(dense.detach(), kind, blocksize, double_quant)
        made += [part for part in fields.values() if isinstance(part, torch.Tensor)]
    return fields


def _blocks(dense: torch.Tensor, kind: str, blocksize: int, double_quant: bool) -> dict[str, Any]:
    functional = bitsandbytes().functional
    packed = torch.empty((dense.numel() + 1) // 2, 1, dtype=torch.uint8, device=dense.device)
    scales: list[torch.Tensor] = []
    state: Any = None
    for part in _parts(dense, blocksize):
        rows = dense[part].contiguous()
        rows = rows if rows.dtype in _KERNEL_DTYPES else rows.float()
        bytes_, state = functional.quantize_4bit(
            rows, blocksize=blocksize, compress_statistics=False, quant_type=kind
        )
        start = part.start * dense.shape[1] // 2
        packed[start : start + bytes_.numel()] = bytes_
        scales.append(state.absmax)
    state.shape, state.absmax = dense.shape, torch.cat(scales)
    if double_quant:
        # As `quantize_4bit` does it, which sees all scales at once.
        state.nested, state.offset = True, state.absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(
            state.absmax - state.offset, blocksize=256
        )
    return fields_of(packed, state)


def parts_of_linear8bit(source: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Codes, scales and threshold of a `Linear8bitLt` or an `Int8Params`, shared; a bare weight has
    threshold 6, transformers' default.

    Raises:
        QuantizationError: it is not quantized yet, or its scales are missing.
    """
    weight = getattr(source, "weight", source)
    state = getattr(source, "state", None)
    scales = getattr(weight, "SCB", None)
    # The first forward pass moves the scales from the weight to the module's state.
    scales = getattr(state, "SCB", None) if scales is None else scales
    if weight.dtype != torch.int8:
        raise QuantizationError(
            f"an 8-bit layer holds {weight.dtype} weights, not int8: it is not quantized yet, or "
            "keeps float16 weights (`llm_int8_has_fp16_weight`). Move it to its device first, "
            "which quantizes it."
        )
    if scales is None:
        raise QuantizationError("8-bit weights without scales (SCB): load them again.")
    threshold = 6.0 if state is None else float(state.threshold)
    require_device(weight.device)
    return _plain(weight).contiguous(), _plain(scales).reshape(-1), threshold


def parts_of_linear4bit(source: Any) -> dict[str, Any]:
    """The fields of `FourBitBytes` for a `Linear4bit` or a `Params4bit`, shared.

    A layer that has run on an AVX-512 CPU has re-ordered its bytes for that CPU; these are put back
    in order, a copy.

    Raises:
        QuantizationError: it is not quantized yet.
    """
    weight = getattr(source, "weight", source)
    state = getattr(weight, "quant_state", None)
    state = getattr(source, "quant_state", None) if state is None else state
    if state is None:
        raise QuantizationError(
            "4-bit weights without a quant_state: they are not quantized yet. Move the layer to "
            "its device first, which quantizes it."
        )
    require_device(weight.device)
    packed = _plain(weight)
    if getattr(state, "packing_format_for_cpu", False):
        packed, state = _in_order(packed, state)
    return fields_of(packed, state)


def _in_order(packed: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """Undo bitsandbytes' packing for AVX-512 CPUs, without touching the layer's own state."""
    state = copy.copy(state)
    # The scales were rounded to bfloat16 and are not quantized any more: keep them as they are.
    state.original_nested = False
    absmax = state.absmax.t().reshape(-1).float()
    packed, state = bitsandbytes().functional._convert_weight_packed_for_cpu_inverse(packed, state)
    state.absmax, state.nested = absmax, False
    return packed, state


def fields_of(packed: torch.Tensor, state: Any) -> dict[str, Any]:
    """The fields of `FourBitBytes` for packed bytes and bitsandbytes' description of them."""
    if len(state.shape) != 2:
        raise QuantizationError(
            f"only matrices are multiplied in 4 bits, not a {list(state.shape)} tensor."
        )
    nested = state.state2 if state.nested else None
    return {
        # The bytes may be stored as another dtype; a column, as the kernels want them.
        "packed": packed.reshape(-1).view(torch.uint8).reshape(-1, 1),
        "absmax": _plain(state.absmax).reshape(-1),
        "code": full_code(_plain(state.code), state.quant_type),
        "shape": (state.shape[0], state.shape[1]),
        "blocksize": state.blocksize,
        "quant_type": state.quant_type,
        "quant_dtype": state.dtype,
        "nested_absmax": None if nested is None else _plain(nested.absmax).reshape(-1),
        "nested_code": None if nested is None else _plain(nested.code),
        "nested_offset": None if nested is None else _plain(state.offset).reshape(()),
        "nested_blocksize": 256 if nested is None else nested.blocksize,
    }


def full_code(code: torch.Tensor, kind: str) -> torch.Tensor:
    """The table of a 4-bit type as float32: bitsandbytes makes it in the default dtype of the
    process, in which it is kept and saved beside the bytes; the bytes are the same.

    Args:
        code: [16], as it came.
        kind: "nf4" or "fp4".

    Returns:
        The table itself if it is float32, or not that of the type.
    """
    if code.dtype == torch.float32 or not code.is_floating_point() or kind not in _CODES:
        return code
    if code.is_meta:
        return torch.empty(code.shape, dtype=torch.float32, device="meta")
    full = torch.tensor(_CODES[kind], dtype=torch.float32, device="cpu").to(code.device)
    return full if torch.equal(full.to(code.dtype), code.reshape(-1)) else code


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without bitsandbytes' subclass, sharing its memory."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)
