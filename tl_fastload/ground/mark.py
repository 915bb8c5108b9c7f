"""The mark on a model that a step writes into: asked for by whatever reads or writes its weights.

`placement.half_written` puts it on before the first write and takes it off after the last.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from tl_fastload.errors import HalfWrittenError

MARK = "_half_written"
REMEDY = (
    "Load all of its weights again (load_weights_, or load_and_process_state_dict of a complete "
    "state dict that is not this model's own), or load the model anew."
)


@dataclass
class Mark:
    """What stands on a model that is being written to, or was left so.

    Attributes:
        step: what was being done.
        written: names of the tensors that may hold new values.
    """

    step: str
    written: set[str] = field(default_factory=set)


def require_whole(model: nn.Module, doing: str) -> None:
    """Raise HalfWrittenError if a step in place was interrupted in a model or in a part of it.

    Args:
        model: any module.
        doing: what is refused, as a noun: "save_lean".
    """
    for name, module in model.named_modules():
        mark = module.__dict__.get(MARK)
        if mark is not None:
            raise HalfWrittenError(
                f"{doing}: {name or 'the model'} is half-written, as {mark.step} was stopped in "
                f"the middle: some of its weights are new and others are not. {REMEDY}"
            )


def is_half_written(model: nn.Module) -> bool:
    """Whether a step in place was stopped in the middle of this model."""
    return MARK in model.__dict__
