"""Square matrices, whose sides TransformerLens 3 tells apart by their lengths.

Its `fold_layer_norm` and `center_unembed` compare a matrix's sides with the length of a norm, with
`d_model` and with `d_vocab`. Where two of these are equal it may take one side for the other, and
what it folds changes the model's output. Here its processing meets such matrices with one side of
another length: the operations that it records are then those of a model that is not square, and are
recorded once more on the matrices as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tl_fastload.ground import compat
from tl_fastload.placement.own_values import as_promise
from tl_fastload.recipes.nodes import Call, Node, Pick, dtype_of, meta_of, shape_of
from tl_fastload.recipes.promise import Promise

# Which dimension of a parameter has the side that gets another length. No two groups meet in one
# operation, so that each can have it alone.
_HIDDEN = {"W_in": 1, "W_gate": 1, "b_in": 0, "b_gate": 0, "W_out": 0, "ln.w": 0, "ln.b": 0}
_READ_BY_UNEMBEDDING = {"unembed.W_U": 0, "ln_final.w": 0, "ln_final.b": 0}
_CENTRED = ("unembed.W_U", "unembed.b_U")


@dataclass(eq=False)
class _StandIn(Node):
    """A weight that pretends to have another shape; it is never evaluated."""

    promise: Promise
    meta: torch.Tensor = field(repr=False)


def run_on_sides(
    model: Any,
    promises: dict[str, Promise],
    flags: dict[str, bool],
    stock: Callable[..., None],
    recipes: dict[str, Promise],
) -> list[str]:
    """Run TransformerLens' processing; what it cannot tell apart by length differs in length.

    Args:
        model: the model, or what stands in for it.
        promises: the state dict; changed.
        flags: the processing steps.
        stock: TransformerLens' bound `load_and_process_state_dict`.
        recipes: what it would load; put there by `stock`, changed here.

    Returns:
        What the report has to say about it.
    """
    cfg = model.cfg
    sides, notes = _mistaken(cfg, flags, promises) if compat.GUESSES_SIDES else ({}, [])
    if not sides:
        stock(promises, **flags)
        return notes
    promises = model.fill_missing_keys(promises)  # with the lengths that the model has
    # Told nothing of the lengths, TransformerLens takes its own order of the sides.
    alone = "unembed.W_U" in sides and flags["center_unembed"]
    dtypes = {name: promises[name].dtype for name in _CENTRED if alone and name in promises}
    # Not rounded between folding and centring.
    promises.update({name: promises[name].float() for name in dtypes})  # type: ignore[misc]
    for name, dim in sides.items():
        value = promises[name]
        promise = value if isinstance(value, Promise) else as_promise(value, name)
        promises[name] = _pretending(promise, dim, _other_length(cfg))
    stock(promises, **{**flags, "center_unembed": flags["center_unembed"] and not alone})
    again = _Again()
    recipes.update({name: again.recipe(recipe) for name, recipe in recipes.items()})
    if alone:
        centred = model.center_unembed({name: recipes[name] for name in dtypes})
        recipes.update({name: centred[name].to(dtype) for name, dtype in dtypes.items()})
    return notes


def _mistaken(
    cfg: Any, flags: Mapping[str, bool], promises: Mapping[str, Any]
) -> tuple[dict[str, int], list[str]]:
    """Parameters of which TransformerLens would take one side for another, with the dimension
    that is to differ; and what the report says.
    """
    folds = flags["fold_ln"]
    centres = flags["center_unembed"] or (folds and cfg.normalization_type in ("LN", "LNPre"))
    found: dict[str, int] = {}
    notes: list[str] = []
    if folds and not cfg.attn_only and cfg.d_mlp == cfg.d_model:
        for layer in range(cfg.n_layers):
            found |= {f"blocks.{layer}.mlp.{leaf}": dim for leaf, dim in _HIDDEN.items()}
        found = {name: dim for name, dim in found.items() if name in promises}
        if found:
            notes.append(_note("d_mlp", cfg.d_mlp, "mlp.W_in"))
    out, inside = cfg.d_vocab_out, cfg.d_vocab
    if (folds and out == cfg.d_model) or (centres and out != inside == cfg.d_model):
        found |= {name: dim for name, dim in _READ_BY_UNEMBEDDING.items() if name in promises}
        notes.append(_note("the vocabulary", cfg.d_model, "unembed.W_U"))
    return found, notes


def _note(what: str, length: int, name: str) -> str:
    return (
        f"TransformerLens {compat.TRANSFORMER_LENS} takes one side of {name} for the other where "
        f"{what} and d_model are both {length}, and its processed numbers are wrong. Here the "
        "norms are folded into the right side."
    )


def _other_length(cfg: Any) -> int:
    """A length that no side of the model has."""
    taken = {cfg.d_model, cfg.d_mlp, cfg.d_vocab, cfg.d_vocab_out, cfg.d_head, cfg.n_heads}
    return next(n for n in range(cfg.d_model + 1, cfg.d_model + 9) if n not in taken)


def _pretending(promise: Promise, dim: int, length: int) -> Promise:
    shape = list(promise.shape)
    shape[dim] = length
    meta = torch.empty(shape, dtype=promise.dtype, device="meta")
    made = Promise(_StandIn(promise, meta), meta, promise.device)
    made.memory, promise.memory = promise.memory, None  # what stock holds is counted once
    return made


class _Again:
    """Records what was recorded once more, on the weights as they are."""

    def __init__(self) -> None:
        self._pretends: dict[Node, bool] = {}
        self._real: dict[Node, Any] = {}

    def recipe(self, promise: Promise) -> Promise:
        """The same recipe without stand-ins; one that has none is as it was."""
        if not self._has_stand_in(promise.node):
            return promise
        real: Promise = self._value(promise.node, promise.device)
        return real

    def _has_stand_in(self, value: Any) -> bool:
        if isinstance(value, (tuple, list)):
            return any(map(self._has_stand_in, value))
        if not isinstance(value, Node):
            return False
        if value not in self._pretends:
            inner = [value.call] if isinstance(value, Pick) else []
            if isinstance(value, Call):
                inner = [*value.args, *value.kwargs.values()]
            self._pretends[value] = isinstance(value, _StandIn) or self._has_stand_in(inner)
        return self._pretends[value]

    def _value(self, value: Any, device: torch.device) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)([self._value(item, device) for item in value])
        if not isinstance(value, Node):
            return value
        if value not in self._real:
            self._real[value] = self._of_node(value, device)
        return self._real[value]

    def _of_node(self, node: Node, device: torch.device) -> Any:
        if isinstance(node, _StandIn):
            return node.promise
        if not self._has_stand_in(node):
            meta = torch.empty_strided(
                shape_of(node), meta_of(node).stride(), dtype=dtype_of(node), device="meta"
            )
            return Promise(node, meta, device)
        if isinstance(node, Pick):
            return self._value(node.call, device)[node.index]
        assert isinstance(node, Call)  # sources have no parts
        kwargs = {key: self._value(item, device) for key, item in node.kwargs.items()}
        return node.func(*self._value(node.args, device), **kwargs)
