"""What torch makes of what it is not told: our own dtype and device, whatever the caller has set.

Libraries that run during a load make tensors without saying of which dtype, and take what
`torch.set_default_dtype`, `torch.set_default_device` or a `with torch.device(...)` say at that
moment. These belong to the caller (the first to all of the process's threads), so they are neither
followed nor changed: in the thread that loads, a mode fills in what was left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn, overrides
from torch._ops import OpOverload

from tl_fastload.ground.compat import no_autocast

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _named(*names: str) -> frozenset[Any]:
    found = (getattr(torch, name, None) for name in names)
    return frozenset(function for function in found if function is not None)


# Functions whose result has the default dtype if none is given.
_FLOATS = _named(
    *("empty", "zeros", "ones", "rand", "randn", "eye", "linspace", "logspace", "scalar_tensor"),
    *("empty_strided", "empty_permuted"),
    *("bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window"),
)
# Functions whose result has it if some number among the arguments is a float.
_BY_NUMBERS = _named("arange", "range", "full")
# Functions of data, which may know a dtype and a device of its own.
_OF_DATA = _named("tensor", "as_tensor", "asarray")
_INTEGERS = _named("randint", "randperm", "tril_indices", "triu_indices")
_TO: Any = torch.Tensor.to
_FILLED = _FLOATS | _BY_NUMBERS | _OF_DATA | _INTEGERS | {_TO}
# Elementwise sums that turn integers into the default dtype.
_PROMOTING = frozenset(
    name.format(function)
    for function in (
        *("add", "sub", "mul", "pow", "div", "truediv", "rdiv", "rtruediv", "radd", "rsub", "rmul"),
        *("rpow", "true_divide", "subtract", "multiply", "sqrt", "rsqrt", "reciprocal", "exp"),
        *("log", "log2", "sin", "cos", "tanh", "sigmoid"),
    )
    for name in ("{}", "__{}__")
)


class Defaults(overrides.TorchFunctionMode):
    """Gives what torch makes in this thread a dtype and the CPU as its device, where the code names
    none; a `with torch.device(...)` inside of this one still decides.

    Args:
        dtype: of floating point tensors.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Called for every look at a shape: what is none of this mode's business goes first.
        if type(func) is OpOverload:  # which says all, and computes its hash in Python
            return func(*args, **kwargs)
        if func not in _FILLED:
            made = func(*args, **kwargs)
            if not isinstance(made, torch.Tensor) or made.dtype is self._dtype:
                return made
            if self._is_promoted(func, args, kwargs, made):
                cast = [x.to(self._dtype) if isinstance(x, torch.Tensor) else x for x in args]
                return func(*cast, **kwargs)
            return made
        is_float = True if func in _FLOATS else False if func in _INTEGERS else None
        if func in _BY_NUMBERS:
            is_float = any(isinstance(x, float) for x in (*args, *kwargs.values()))
        elif func in _OF_DATA and len(args) == 1:
            is_float = _kind_of(args[0])
        elif func is _TO and _is_emptied(*args):
            return args[0]
        return func(*args, **(kwargs if is_float is None else self._filled(kwargs, is_float)))

    def _filled(self, kwargs: dict[str, Any], is_float: bool) -> dict[str, Any]:
        if kwargs.get("out") is not None:
            return kwargs
        filled = dict(kwargs)
        if is_float and filled.get("dtype") is None:
            filled["dtype"] = self._dtype
        if filled.get("device") is None:
            filled["device"] = torch.device("cpu")
        return filled

    def _is_promoted(self, func: Any, args: Any, kwargs: Any, made: torch.Tensor) -> bool:
        """Whether integers have become floating point numbers of another default dtype."""
        if kwargs:
            return False
        if not made.dtype.is_floating_point or getattr(func, "__name__", "") not in _PROMOTING:
            return False
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        return bool(tensors) and not any(t.is_floating_point() or t.is_complex() for t in tensors)


def _is_emptied(tensor: Any, target: Any = None, *others: Any) -> bool:
    """Whether a parameter's values are thrown away by accelerate's `init_empty_weights`, which the
    caller is in: it replaces `register_parameter` for all threads.
    """
    if not isinstance(tensor, nn.Parameter) or tensor.is_meta or others:
        return False
    return isinstance(target, (str, torch.device)) and torch.device(target).type == "meta"


def _kind_of(data: Any) -> bool | None:
    """Whether data without a dtype of its own holds floats; None if it has one."""
    if isinstance(data, float):  # NumPy's float64 scalar, too, as torch takes it
        return True
    if isinstance(data, (bool, int)):
        return False
    if not isinstance(data, (list, tuple)):
        return None
    kinds = [_kind_of(item) for item in data]
    return None if None in kinds else any(kinds)


@contextmanager
def without_modes() -> Iterator[None]:
    """None of this thread's function modes, the caller's or `Defaults`: for code that names the
    dtype and device of all that it makes, as a mode takes its time at each look at a shape. They
    are there again afterwards, and other threads see nothing of it.
    """
    count = torch._C._len_torch_function_stack()
    held: list[Any] = [overrides._pop_mode() for _ in range(count)]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for mode in reversed(held):
            overrides._push_mode(mode)  # type: ignore[no-untyped-call]


@contextmanager
def own_defaults() -> Iterator[None]:
    """While a load runs in this thread: none of the caller's function modes (default devices,
    `with torch.device(...)`) and no autocasting, and `Defaults` in their place.
    """
    with without_modes(), no_autocast(), Defaults():
        yield


def looking_only(function: _Function) -> _Function:
    """A function that looks at shapes and dtypes, and makes no tensor without saying of which dtype
    and where: no mode of this thread is asked about each of its looks, which take longer so.
    """

    @wraps(function)
    def looking(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return looking  # type: ignore[return-value]
