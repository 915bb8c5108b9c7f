"""Modules built without values: no random numbers drawn, no memory touched."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch._ops import OpOverload
from torch.nn import init
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tl_fastload.ground import compat
from tl_fastload.ground.hf_configs import parts_of
from tl_fastload.ground.own_defaults import Defaults
from tl_fastload.recipes.nodes import aten
from tl_fastload.report.memory import return_freed_memory

_UNIFORM, _NORMAL = aten.uniform_.default, aten.normal_.default
_EMPTY, _TRIL = aten.empty.memory_format, aten.tril.default
_DRAWS: frozenset[Any] = frozenset(
    (
        *(init.kaiming_uniform_, init.uniform_, init.normal_),
        *(torch.Tensor.uniform_, torch.Tensor.normal_),
    )
)


class SkipRandomInit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Leaves fresh memory untouched instead of filling it with random numbers, so that it costs
    nothing.

    Everything else runs, so that buffers (rotary tables, masks) are what TransformerLens computes.
    """

    _made_mask = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _UNIFORM or func is _NORMAL:
            return args[0]
        if self._made_mask and func is _EMPTY:
            # What TransformerLens 2 computes each layer's mask from is freed memory with pages
            # behind it: a parameter that took it would cost its size after all.
            return_freed_memory()
            self._made_mask = False
        self._made_mask |= func is _TRIL
        return func(*args, **(kwargs or {}))


class SkipInitializers(TorchFunctionMode):
    """As `SkipRandomInit`, for modules on the meta device: asked of torch's initializers, not of
    every operation, which is half of what a linear layer takes to be made there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if type(func) is not OpOverload and func in _DRAWS:  # whose hash is Python's
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class _NoValues(SkipRandomInit):  # type: ignore[no-untyped-call]
    """Lets a module that is built on the meta device ask for a value, as xIELU of transformers 4
    does: it gets zero, and never runs.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            if func is aten._to_copy.default:
                kwargs = {**kwargs, "device": args[0].device}
            elif func is aten._local_scalar_dense.default:
                return 0
        return super().__torch_dispatch__(func, types, args, kwargs)


def for_an_empty_model(hf_config: Any, dtype: torch.dtype | None) -> Any:
    """A copy of a configuration from which transformers builds a plain model.

    Args:
        hf_config: not changed.
        dtype: what the configuration says of it, which some modules make their parameters in. Those
            inside it say nothing: transformers makes each part that names a dtype under another
            default dtype, for all threads.
    """
    copied = copy.deepcopy(hf_config)
    for config in parts_of(copied):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        setattr(config, compat.CONFIG_DTYPE_NAME, dtype if config is copied else None)
        config._attn_implementation = "eager"
    return copied


def empty_model(model_class: Any, hf_config: Any, dtype: torch.dtype) -> Any:
    """A transformers model on the meta device, its tied weights tied.

    Args:
        model_class: its class.
        hf_config: its configuration; not changed.
        dtype: of its parameters.
    """
    config = for_an_empty_model(hf_config, dtype)
    with Defaults(dtype), torch.device("meta"), _NoValues():  # type: ignore[no-untyped-call]
        model = _not_generating(model_class)(config)
    model.__class__ = model_class
    model.tie_weights()
    return model


def _not_generating(model_class: Any) -> Any:
    """The class without settings for generation: of a model that is never run they are no news,
    and transformers would log what it thinks of them.
    """
    never = classmethod(lambda cls: False)
    place = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), {**place, "can_generate": never})
