"""Steps that write into a live model: done to the end, or the model says that they were not.

An interrupt (Ctrl-C, a signal, a kernel that is told to stop) can come at any point. So the mark is
on the model before the first write and is taken off after the last, and whatever reads or writes
the model's weights here asks for it first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tl_fastload.errors import HalfWrittenError, LeanLoadError, NotEnoughMemory, is_out_of_memory
from tl_fastload.ground.mark import MARK, REMEDY, Mark
from tl_fastload.ground.words import listed
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.recipes.evaluate import sources
from tl_fastload.recipes.promise import Promise


def require_cover(
    model: nn.Module, doing: str, given: Mapping[str, Any], held: nn.Module | None = None
) -> None:
    """Raise HalfWrittenError if a half-written model would not be whole after a load.

    Args:
        model: the model; one that is whole takes anything.
        doing: the load.
        given: what it brings, by the model's own names: values in memory, recipes, or anything
            else for values that come from elsewhere.
        held: what has the model's tensors under those names, if that is not the model.
    """
    mark = model.__dict__.get(MARK)
    if mark is None:
        return
    held = model if held is None else held
    needed = {name for name, _ in held.named_parameters()} | mark.written
    foreign = given.keys() - set(_shared(held, given))
    lacking = sorted(needed - foreign)
    if lacking:
        raise HalfWrittenError(
            f"{doing}: the model is half-written, as {mark.step} was stopped in the middle, and "
            f"these weights do not make it whole: {listed(lacking, 5)} would stay or come from "
            f"itself. Nothing was written. {REMEDY}"
        )


def forgive(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Take the mark off a model that has just been loaded, if the load made it whole.

    Args:
        model: the model.
        given: what it was loaded from.
    """
    mark = model.__dict__.get(MARK)
    if mark is None:
        return
    needed = {name for name, _ in model.named_parameters()} | mark.written
    if needed <= given.keys() - set(_shared(model, given)):
        model.__dict__.pop(MARK, None)


def _shared(model: nn.Module, given: Mapping[str, Any]) -> Iterable[str]:
    """The names of values that lie in the model's own memory."""
    tensors = (*model.parameters(), *model.buffers())
    own = {address for tensor in tensors for address in _addresses(tensor)}
    for name, value in given.items():
        parts = [value]
        if isinstance(value, Promise):
            parts = [getattr(view.source, "tensor", None) for view in sources(value.node)]
        if any(isinstance(p, torch.Tensor) and not own.isdisjoint(_addresses(p)) for p in parts):
            yield name


def _addresses(tensor: torch.Tensor) -> Collection[int]:
    if isinstance(tensor, QuantizedTensor):
        return {part.untyped_storage().data_ptr() for part in tensor.content.tensors().values()}
    if tensor.is_meta or tensor.numel() == 0:
        return ()
    return (tensor.untyped_storage().data_ptr(),)


class InPlaceStep:
    """A context in which a live model's tensors, and its norms, may be replaced or written to.

    If the body fails before anything was written, the model is as it was. If it fails later, the
    model stays marked, and an ordinary error becomes one that says so. Whatever the body makes of
    the model belongs into it, records of what was done included: the mark goes last.

    Args:
        model: the model.
        step: what is done, for messages.

    Attributes:
        written: names of the tensors that have been, or are being, written to.
    """

    def __init__(self, model: Any, step: str) -> None:
        self.model, self.step = model, step
        self._before = model.__dict__.get(MARK)
        self._mark = Mark(step)
        self._left = set() if self._before is None else set(self._before.written)
        self._norms = getattr(model.cfg, "normalization_type", None)
        self._attributes = dict(model.__dict__)
        self._children = [(parent, dict(parent._modules)) for parent in model.modules()]

    @property
    def written(self) -> set[str]:
        return self._mark.written

    def __enter__(self) -> InPlaceStep:
        self.model.__dict__[MARK] = self._mark
        return self

    def writes(self, name: str) -> None:
        """Called before each write."""
        self._mark.written.add(name)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            self.model.__dict__.pop(MARK, None)
            return
        self.model.__dict__.update(self._attributes)
        self.model.__dict__[MARK] = self._mark
        self.model.cfg.normalization_type = self._norms
        for parent, children in self._children:
            if parent._modules != children:
                parent._modules.clear()
                parent._modules.update(children)
        if not self._mark.written:
            if self._before is None:
                self.model.__dict__.pop(MARK, None)
            else:
                self.model.__dict__[MARK] = self._before
            return
        written = sorted(self._mark.written)
        self._mark.written |= self._left
        if isinstance(error, Exception):
            self._explain(error, written)

    def _explain(self, error: Exception, written: list[str]) -> None:
        found = NotEnoughMemory if is_out_of_memory(error) else HalfWrittenError
        kind: type[LeanLoadError] = found
        raise kind(
            f"{self.step} stopped in the middle ({type(error).__name__}: {error}). The model is "
            f"not as it was: {listed(written)} hold new values, and the others do not. {REMEDY}"
        ) from error
