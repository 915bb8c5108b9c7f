"""bitsandbytes' kernels on quantized bytes: the only import of bitsandbytes, made at first use.

Each product is what the layers of bitsandbytes compute from the same bytes, bit for bit:
`Linear8bitLt.forward` in evaluation mode, and `Linear4bit.forward` without its AVX-512 shortcut,
which rounds weights and scales to bfloat16.
"""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F

from tl_fastload.borrow import SILENT, Silent, borrow
from tl_fastload.errors import QuantizationError
from tl_fastload.own_defaults import own_defaults
from tl_fastload.quantized_bytes import (
    FourBitBytes,
    Int8Bytes,
    QuantizedBytes,
    full_code,
    outline,
)

OLDEST_BITSANDBYTES = (0, 43)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# Values that are quantized at a time: the CPU code of older bitsandbytes holds 16 numbers for each.
_PART_SIZE = 1 << 18

# What the 4-bit kernels multiply in; bitsandbytes returns uninitialised memory for others.
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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


def linear(
    stored: QuantizedBytes,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`x @ W.T + bias` by bitsandbytes' kernel; gradients reach `x` and `bias`.

    Args:
        stored: bytes of W [out, in].
        x: [..., in] activations.
        bias: [out], or None.
        compute_dtype: what a 4-bit kernel multiplies in; None for x's own dtype. 8-bit kernels
            round x to float16.

    Returns:
        [..., out], in x's dtype.
    """
    if x.numel() == 0:
        # Nothing to multiply (an expert without tokens), but still a node of the graph.
        empty = x.sum(-1, keepdim=True).expand(*x.shape[:-1], stored.shape[0])
        return empty if bias is None else empty + bias.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(stored, Int8Bytes):
        product = _linear_int8(stored, rows, bias)
    elif isinstance(stored, FourBitBytes):
        product = _linear_4bit(stored, rows, bias, compute_dtype)
    else:
        raise TypeError(f"no kernel for {type(stored).__name__}")
    return product.reshape(*x.shape[:-1], stored.shape[0])


def _linear_int8(stored: Int8Bytes, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
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


def _linear_4bit(
    stored: FourBitBytes,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    compute_dtype: torch.dtype | None,
) -> torch.Tensor:
    bnb = bitsandbytes()
    dtype = compute_dtype or x.dtype
    if dtype not in _KERNEL_DTYPES:
        dtype = torch.float32
    bias = None if bias is None else bias.to(dtype)
    if _is_misread(stored):
        return F.linear(x.to(dtype), dequantize(stored, dtype), bias).to(x.dtype)
    # bitsandbytes multiplies by the weights in `dtype`, but differentiates through those of the
    # state's dtype.
    state = _quant_state(stored, dtype)
    product: torch.Tensor = bnb.matmul_4bit(
        x.to(dtype), stored.packed.t(), bias=bias, quant_state=state
    )
    return product.to(x.dtype)


def dequantize(stored: QuantizedBytes, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in] that the kernels multiply by: bitsandbytes' own numbers."""
    if stored.device.type == "meta":
        wide = torch.float32 if isinstance(stored, Int8Bytes) else dtype
        return torch.empty(stored.shape, dtype=wide, device="meta").to(dtype)
    bnb = bitsandbytes()
    if isinstance(stored, Int8Bytes):
        if hasattr(bnb.functional, "int8_vectorwise_dequant"):
            values: torch.Tensor = bnb.functional.int8_vectorwise_dequant(
                stored.codes, stored.scales
            )
        else:
            values = stored.codes * stored.scales.view(-1, 1) * 7.874015718698502e-3  # 1 / 127
        return values.to(dtype)
    if isinstance(stored, FourBitBytes):
        direct = dtype if dtype in _KERNEL_DTYPES else torch.float32
        state = _quant_state(stored, direct)
        if _is_misread(stored):
            state.shape = torch.Size((1, stored.shape[0] * stored.shape[1]))
        values = bnb.functional.dequantize_4bit(stored.packed, state)
        return values.reshape(stored.shape).to(dtype)
    raise TypeError(f"no kernel for {type(stored).__name__}")


def _is_misread(stored: FourBitBytes) -> bool:
    # On AVX-512 CPUs bitsandbytes (0.50) starts each row in a block of its own, which is wrong
    # unless rows are whole numbers of blocks. Of a single long row it makes the right values.
    return stored.device.type == "cpu" and stored.shape[1] % stored.blocksize != 0


def _quant_state(stored: FourBitBytes, dtype: torch.dtype) -> Any:
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


def quantize(
    dense: torch.Tensor,
    kind: str,
    *,
    threshold: float = 6.0,
    blocksize: int = 64,
    double_quant: bool = False,
) -> QuantizedBytes:
    """Quantize a matrix, byte for byte as bitsandbytes does, on the matrix's device.

    Args:
        dense: [out, in], floating point.
        kind: "int8", "nf4" or "fp4".
        threshold: of outlier activations, for int8.
        blocksize: values per block, for the 4-bit kinds.
        double_quant: whether to quantize the scales too, for the 4-bit kinds.

    Raises:
        QuantizationError: not a matrix, a kind or a block size of bitsandbytes; or values that int8
            cannot scale.
    """
    if dense.dim() != 2 or not dense.is_floating_point():
        raise QuantizationError(
            f"only a floating point matrix can be quantized, not {list(dense.shape)} {dense.dtype}."
        )
    if kind not in ("int8", "nf4", "fp4"):
        raise QuantizationError(f"quantization is 'int8', 'nf4' or 'fp4', not {kind!r}.")
    if dense.is_meta:
        return outline(dense.shape[0], dense.shape[1], kind, blocksize, double_quant)
    require_device(dense.device)
    dense = dense.detach()
    if kind != "int8" and blocksize not in BLOCKSIZES:
        raise QuantizationError(f"block size {blocksize} is not one of {list(BLOCKSIZES)}.")
    with own_defaults():
        if kind == "int8":
            return _quantize_int8(dense, threshold)
        return _quantize_4bit(dense, kind, blocksize, double_quant)


def _parts(dense: torch.Tensor, blocksize: int = 1) -> list[slice]:
    """Runs of rows that are whole numbers of blocks: bitsandbytes needs a few copies of what it
    quantizes, so it gets a part at a time.
    """
    rows, columns = dense.shape
    step = max(1, _PART_SIZE // max(columns, 1))
    if columns % blocksize:
        step = -(-step // blocksize) * blocksize
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]


def _quantize_int8(dense: torch.Tensor, threshold: float) -> Int8Bytes:
    codes = torch.empty(dense.shape, dtype=torch.int8, device=dense.device)
    scales = torch.empty(dense.shape[0], dtype=torch.float32, device=dense.device)
    for part in _parts(dense):
        # A copy: on the CPU bitsandbytes would hold on to, or write into, what it is given.
        rows = dense[part].cpu().clone(memory_format=torch.contiguous_format)
        parameter = bitsandbytes().nn.Int8Params(rows, requires_grad=False).to(dense.device)
        codes[part], scales[part] = parameter.data, parameter.SCB
    if not bool(torch.isfinite(scales).all()):
        raise QuantizationError(
            "the matrix has values beyond float16, which int8 quantization goes through. Quantize "
            "to 'nf4' or 'fp4'."
        )
    return Int8Bytes(codes, scales, threshold)


def _quantize_4bit(
    dense: torch.Tensor, kind: str, blocksize: int, double_quant: bool
) -> FourBitBytes:
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
    return _from_quant_state(packed, state)


def from_linear8bit(source: Any, threshold: float | None = None) -> Int8Bytes:
    """The bytes of a `Linear8bitLt` or an `Int8Params`, shared.

    Args:
        source: the module or its weight.
        threshold: of outliers; None for the module's own (a bare weight: 6, transformers' default).

    Raises:
        QuantizationError: it is not quantized yet, or its scales are missing or misshapen.
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
    if threshold is None:
        threshold = 6.0 if state is None else float(state.threshold)
    require_device(weight.device)
    return Int8Bytes(_plain(weight).contiguous(), _plain(scales).reshape(-1), threshold)


def from_params4bit(source: Any) -> FourBitBytes:
    """The bytes of a `Linear4bit` or a `Params4bit`, shared.

    A layer that has run on an AVX-512 CPU has re-ordered its bytes for that CPU; these are put back
    in order, a copy.

    Raises:
        QuantizationError: it is not quantized yet, or its scales are missing or misshapen.
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
    return _from_quant_state(packed, state)


def compute_dtype_of(module: Any) -> torch.dtype | None:
    """The dtype that a `Linear4bit` multiplies in; None where it follows its input."""
    dtype = getattr(module, "compute_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _in_order(packed: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """Undo bitsandbytes' packing for AVX-512 CPUs, without touching the layer's own state."""
    state = copy.copy(state)
    # The scales were rounded to bfloat16 and are not quantized any more: keep them as they are.
    state.original_nested = False
    absmax = state.absmax.t().reshape(-1).float()
    packed, state = bitsandbytes().functional._convert_weight_packed_for_cpu_inverse(packed, state)
    state.absmax, state.nested = absmax, False
    return packed, state


def _from_quant_state(packed: torch.Tensor, state: Any) -> FourBitBytes:
    if len(state.shape) != 2:
        raise QuantizationError(
            f"only matrices are multiplied in 4 bits, not a {list(state.shape)} tensor."
        )
    nested = state.state2 if state.nested else None
    return FourBitBytes(
        # The bytes may be stored as another dtype; a column, as the kernels want them.
        packed=packed.reshape(-1).view(torch.uint8).reshape(-1, 1),
        absmax=_plain(state.absmax).reshape(-1),
        code=full_code(_plain(state.code), state.quant_type),
        shape=(state.shape[0], state.shape[1]),
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        quant_dtype=state.dtype,
        nested_absmax=None if nested is None else _plain(nested.absmax).reshape(-1),
        nested_code=None if nested is None else _plain(nested.code),
        nested_offset=None if nested is None else _plain(state.offset).reshape(()),
        nested_blocksize=256 if nested is None else nested.blocksize,
    )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without bitsandbytes' subclass, sharing its memory."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)
