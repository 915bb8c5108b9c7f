"""Devices for machines without any: tensors on them lie in ordinary memory, have their values, and
meet no tensor of another device, as on real ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# A kind of device that torch knows everywhere, and that nothing here uses.
FIRST, SECOND, THIRD = (torch.device("lazy", index) for index in range(3))
_MAY_MEET = (torch.ops.aten.copy_.default,)


class OnDevice(torch.Tensor):
    """A tensor that says it is on a device.

    value: it, in ordinary memory.
    """

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor, device: torch.device) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=device,
        )
        made.value = value
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.value} on {self.device}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.value.tolist()


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class FakeDevices(TorchFunctionMode):
    """While it is on, tensors can be made on the devices, and moved there."""

    def __enter__(self) -> Any:
        self._operations = _Operations()  # type: ignore[no-untyped-call]
        self._operations.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._operations.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:  # which no mode sees
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.histc:  # of whole numbers, which accelerators count and the host does not
            return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    fakes = [x for x in tensors if isinstance(x, OnDevice)]
    asked = kwargs.get("device")
    device = torch.device(asked) if asked is not None else None
    if not fakes and (device is None or device.type != "lazy"):
        return func(*args, **kwargs)
    met = {x.device for x in tensors if x.dim() > 0 or isinstance(x, OnDevice)}
    if len(met) > 1 and func not in _MAY_MEET:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}, {met}")
    to = device or (fakes[0].device if func not in _MAY_MEET else tensors[0].device)
    known = {id(x.value): x for x in fakes}
    plain = {**kwargs, **({} if asked is None else {"device": torch.device("cpu")})}
    out = func(*tree_map(_value, args), **tree_map(_value, plain))

    def on_device(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or id(x) in known:
            return known.get(id(x), x)
        if to.type != "lazy":
            return x.clone() if any(x is fake.value for fake in fakes) else x
        return OnDevice(x, to)

    return tree_map(on_device, out)


def _value(x: Any) -> Any:
    return x.value if isinstance(x, OnDevice) else x


def back(x: Any) -> Any:
    """What lies on a fake device as an ordinary tensor."""
    return tree_map(_value, x)
