"""What one load records: the session, and TransformerLens' processing run on its promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules.module import _IncompatibleKeys

from tl_fastload.errors import warn_numbers
from tl_fastload.ground import compat
from tl_fastload.ground.borrow import silenced
from tl_fastload.hooked import steps
from tl_fastload.hooked.names import role
from tl_fastload.hooked.norms import unit_norms
from tl_fastload.hooked.observer import Observer
from tl_fastload.hooked.origin import Origin
from tl_fastload.hooked.shifts import kernel_shifts
from tl_fastload.hooked.square import run_on_sides
from tl_fastload.hooked.state_dicts import as_promise, own_values_apart
from tl_fastload.placement.placer import Placer
from tl_fastload.quantized import has_quantized
from tl_fastload.recipes.evaluate import evaluate
from tl_fastload.recipes.promise import Promise
from tl_fastload.request.options import Options


@dataclass
class Session:
    """State of one load.

    Attributes:
        options: strategy, mapping, progress.
        requested: the processing steps that the caller asked for.
        origin: where the weights come from; None for a state dict.
        recipes: parameter name -> recipe, collected from TransformerLens' `load_state_dict` calls.
        notes: for the report.
        mapped_bytes: parameter bytes that were mapped.
        shifts: what processing takes out of the inputs of quantized matrices.
        not_quantized: matrices of a quantized model that are dense, and why.
        mark: told the name of each phase as it begins.
        watch: told the devices that the load uses, before it does.
        ledger: counts what stock would need; None unless that is wanted.
        placer: what would place the recipes, when nothing but a plan is wanted.
    """

    options: Options
    requested: dict[str, bool]
    origin: Origin | None = None
    recipes: dict[str, Promise] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    mapped_bytes: int = 0
    shifts: dict[str, Promise] = field(default_factory=dict)
    not_quantized: dict[str, str] = field(default_factory=dict)
    mark: Callable[[str], None] = lambda phase: None
    watch: Callable[[Iterable[torch.device]], None] = lambda devices: None
    ledger: Observer | None = None
    placer: Placer | None = None

    def collect(self, state_dict: dict[str, Any]) -> _IncompatibleKeys:
        """Take what TransformerLens would load; it is placed when all of it is known."""
        for name, value in state_dict.items():
            self.recipes[name] = value if isinstance(value, Promise) else as_promise(value, name)
        if self.ledger is not None:
            self.ledger.load(state_dict)
        return _IncompatibleKeys([], [])


def record_processing(
    model: Any,
    session: Session,
    state_dict: dict[str, Any],
    flags: dict[str, bool],
    stock: Callable[..., None],
) -> None:
    """Run TransformerLens' `load_and_process_state_dict` on promises; `session.recipes` are then
    what it would load.

    Args:
        model: the model, or what stands in for it: TransformerLens' `load_state_dict` of it calls
            `session.collect`.
        session: gets the recipes.
        state_dict: TransformerLens names -> tensors or promises; not changed.
        flags: the processing steps; those that the model does not allow are left out.
        stock: TransformerLens' bound `load_and_process_state_dict`.
    """
    own: dict[str, Any] = {}
    if session.ledger is not None and session.origin is not None:
        own = session.ledger.hand_over(session.origin.root, state_dict)
        state_dict.clear()  # which `from_pretrained` holds: stock puts its copies in this very one
        state_dict = own
    promises = {
        name: value if isinstance(value, Promise) else as_promise(value, name)
        for name, value in own_values_apart(model, state_dict).items()
        if isinstance(value, torch.Tensor)
    }
    own = state_dict = {}  # the promises are held once, as the tensors are in stock
    # TransformerLens guards only some of its roads; unguarded steps change the model's output.
    allowed = {
        step: on and steps.reason_to_skip(step, model.cfg) is None for step, on in flags.items()
    }
    if session.origin is None and has_quantized(model):
        # Their values now: the parameters that they are made of are written to one by one.
        session.shifts = {
            name: as_promise(evaluate(shift.node, shift.device).tensor.clone(), name)
            for name, shift in kernel_shifts(promises, model.cfg, allowed).items()
        }
    elif session.origin is not None and session.origin.spec is not None:
        session.shifts = kernel_shifts(promises, model.cfg, allowed)
    is_given = session.origin is not None and not session.options.only_plan
    if compat.REPLACES_NORMS and not is_given and allowed["fold_ln"]:
        if session.origin is None and any(role(n).is_folded for n, _ in model.named_parameters()):
            session.notes.append(
                warn_numbers(
                    f"TransformerLens {compat.TRANSFORMER_LENS} folds the norms of the state dict "
                    "and leaves those of the model as they are, so that both are applied. Use "
                    "process_weights_, or a model whose cfg.normalization_type ends in Pre."
                )
            )
        promises |= unit_norms(model, promises)
    if session.options.only_plan:
        stock = silenced(stock)
    session.notes += run_on_sides(model, promises, allowed, stock, session.recipes)
