"""Norms that TransformerLens 2 replaces by ones without weights, folded or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from tl_fastload import compat, steps
from tl_fastload.promise import Promise
from tl_fastload.state_dicts import as_promise
from tl_fastload.verify import check_refactor


def kept_norms(cfg: Any, requested: Mapping[str, bool]) -> list[str]:
    """Let a model have the norm weights that stock would drop without folding them.

    Args:
        cfg: the configuration that the model is built with; changed.
        requested: the processing steps that were asked for.

    Returns:
        What the report has to say about it.
    """
    if not requested["fold_ln"] or not steps.drops_norms(cfg):
        return []
    cfg.normalization_type = cfg.normalization_type.removesuffix("Pre")
    return [
        "fold_ln is skipped and the norms keep their weights: TransformerLens "
        f"{compat.TRANSFORMER_LENS} drops those of a model with experts without folding them, "
        "which makes its numbers wrong. Version 3 folds them."
    ]


def replace_and_process(model: Any, flags: dict[str, bool], stock: Callable[..., None]) -> None:
    """Run TransformerLens 2's own `process_weights_`; if it fails, the model is as it was.

    Args:
        model: the model.
        flags: the processing steps.
        stock: the model's own bound `process_weights_`, which replaces the norms and then calls
            `load_and_process_state_dict`.
    """
    check_refactor(model.cfg, flags)
    asked = {step: on for step, on in flags.items() if step != "fold_value_biases"}
    with norms_put_back_on_error(model):
        stock(**asked)


@contextlib.contextmanager
def norms_put_back_on_error(model: Any) -> Iterator[None]:
    """Give a model back the norms that TransformerLens has replaced, if the body raises."""
    kind = model.cfg.normalization_type
    modules = [(parent, dict(parent._modules)) for parent in model.modules()]
    try:
        yield
    except BaseException:
        model.cfg.normalization_type = kind
        for parent, children in modules:
            parent._modules.clear()
            parent._modules.update(children)
        raise


def unit_norms(model: Any, promises: dict[str, Promise]) -> dict[str, Promise]:
    """Weights of one and biases of zero for norms that are folded already.

    TransformerLens 2 folds what it finds in the state dict and fails without it.

    Args:
        model: the model; norms that it has need no stand-in.
        promises: the state dict.
    """
    cfg, own = model.cfg, model.state_dict(keep_vars=True)
    blocks = [f"blocks.{layer}" for layer in range(cfg.n_layers)]
    widths = {f"{block}.ln1": cfg.d_model for block in blocks}
    if not cfg.attn_only:
        widths |= {f"{block}.ln2": cfg.d_model for block in blocks}
        if cfg.is_layer_norm_activation():
            widths |= {f"{block}.mlp.ln": cfg.d_mlp for block in blocks}
    widths["ln_final"] = cfg.d_model
    missing: dict[str, Promise] = {}
    for norm, width in widths.items():
        for leaf, value in (("w", 1.0), ("b", 0.0)):
            name = f"{norm}.{leaf}"
            if name not in promises and name not in own:
                filled = torch.full((width,), value, dtype=cfg.dtype, device="cpu")
                missing[name] = as_promise(filled, name)
    return missing
