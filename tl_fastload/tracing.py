"""Sums on tensors while somebody traces: torch.compile, fake tensors, torch.func."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

Result = TypeVar("Result")


def untraced() -> AbstractContextManager[Any]:
    """Operations in this context are run at once, and no tracer sees them.

    The geometry of a view is kept as a meta tensor. It is bookkeeping, not part of the program that
    is traced, and tracers refuse tensors that are not their own.
    """
    if not torch._C._len_torch_dispatch_stack():
        return nullcontext()
    return _python_dispatch._disable_current_modes()


def runs_untraced(function: Callable[..., Result]) -> Callable[..., Result]:
    """Decorator: every call of the function is `untraced`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Result:
        with untraced():
            return function(*args, **kwargs)

    return run


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jacrev ...) or forward-mode differentiation is at work."""
    functions: Any = torch._C._functorch
    return functions.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
