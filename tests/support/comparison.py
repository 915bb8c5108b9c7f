"""Telling a lean model and stock's apart: every difference, as sentences."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer

from tests.support import reference
from tests.support.zoo import tokens
from tl_fastload import LeanHookedTransformer
from tl_fastload.ground.geometry import is_dense
from tl_fastload.quantized import QuantizedTensor

STEPS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
NAMES = ("model_name", "tokenizer_name")
"""Fields of cfg that follow from where a model was loaded, not from what it is."""

Cache = Mapping[str, torch.Tensor]


def lean_model(source: str | Path, **arguments: Any) -> LeanHookedTransformer:
    """`from_pretrained_lean` on the CPU unless there is a device map, without a bar."""
    where = {} if arguments.get("device_map") else {"device": "cpu"}
    arguments = {**where, "progress": False, **arguments}
    return LeanHookedTransformer.from_pretrained_lean(source, **arguments)


def stock_model(case_id: str, folder: Path, **flags: Any) -> HookedTransformer:
    """Stock's load on the CPU, without the steps that are wrong: the fold of value biases of
    gpt-oss, unless stock is too old to have attention sinks, and in TransformerLens 2 the fold of
    norms in front of experts, which only drops their weights.
    """
    if case_id == "gpt-oss" and reference.TRANSFORMER_LENS.major >= 3:
        flags["fold_value_biases"] = False
    if case_id in ("mixtral", "gpt-oss") and reference.TRANSFORMER_LENS.major < 3:
        flags["fold_ln"] = False
    return reference.stock_model(case_id, folder, device="cpu", **flags)


def differences(
    stock: HookedTransformer,
    lean: HookedTransformer,
    *,
    cfg_apart: Collection[str] = (),
    gaps: bool = False,
) -> list[str]:
    """Everything in which two models differ: none, if the lean load is right.

    The documented differences do not count: experts and routers (the only `torch.nn.Linear`) in
    `cfg.dtype`, the position embedding of ALiBi models, which stock leaves uninitialised, and
    rotary tables that stock computes wrongly: it gets those of the lean model.
    cfg_apart: fields of cfg that may differ.
    gaps: parameters of the lean model may be views into larger memory (`mmap=True`, unprocessed).
    """
    if any("rotary tables are transformers' own" in note for note in lean.load_report.notes):
        for block, right in zip(stock.blocks, lean.blocks, strict=True):
            block.attn.rotary_sin.copy_(right.attn.rotary_sin)
            block.attn.rotary_cos.copy_(right.attn.rotary_cos)
    return [
        *_names_apart(stock, lean),
        *_tensors_apart(stock, lean),
        *([] if gaps else memory_apart(lean)),
        *_modules_apart(stock, lean),
        *_cfg_apart(stock, lean, cfg_apart),
    ]


def _names_apart(stock: HookedTransformer, lean: HookedTransformer) -> Iterator[str]:
    pairs = {
        "state_dict": (list(stock.state_dict()), list(lean.state_dict())),
        "parameters": (list(dict(stock.named_parameters())), list(dict(lean.named_parameters()))),
        "buffers": (list(dict(stock.named_buffers())), list(dict(lean.named_buffers()))),
        "hook_dict": (list(stock.hook_dict), list(lean.hook_dict)),
    }
    for what, (wanted, found) in pairs.items():
        if wanted != found:
            yield f"{what}: other names or order: {sorted(set(wanted) ^ set(found))}"


def _tensors_apart(stock: HookedTransformer, lean: HookedTransformer) -> Iterator[str]:
    wanted = {**dict(stock.named_parameters()), **dict(stock.named_buffers())}
    found = {**dict(lean.named_parameters()), **dict(lean.named_buffers())}
    for name in wanted.keys() & found.keys():
        one, other = wanted[name], found[name]
        if ".mlp." in name and name.endswith(".weight") and other.dtype == lean.cfg.dtype:
            one = one.detach().to(other.dtype).requires_grad_(one.requires_grad)
        for what in ("shape", "dtype", "device", "requires_grad"):
            if getattr(one, what) != getattr(other, what):
                yield f"{name}: {what} {getattr(other, what)}, not {getattr(one, what)}"
        if name == "pos_embed.W_pos" and lean.cfg.positional_embedding_type == "alibi":
            continue
        if one.shape == other.shape and not torch.equal(one, other.to(one.dtype)):
            apart = (one.double() - other.double()).abs().max()
            yield f"{name}: values up to {apart:.1e} apart"


def memory_apart(lean: torch.nn.Module) -> Iterator[str]:
    """Parameters that are not dense, or whose storage is not exactly theirs."""
    owners: dict[tuple[str, int], str] = {}
    for name, parameter in lean.named_parameters():
        if isinstance(parameter, QuantizedTensor) or parameter.numel() == 0:
            continue
        if not is_dense(parameter):
            yield f"{name}: strides {parameter.stride()} of shape {tuple(parameter.shape)}"
        storage = parameter.untyped_storage()
        if storage.nbytes() != parameter.numel() * parameter.element_size():
            yield f"{name}: a storage of {storage.nbytes()} bytes for {parameter.numel()} elements"
        other = owners.setdefault((str(parameter.device), storage.data_ptr()), name)
        if other != name:
            yield f"{name}: shares its storage with {other}"


def _modules_apart(stock: HookedTransformer, lean: HookedTransformer) -> Iterator[str]:
    wanted = {name: (type(m).__name__, m.training) for name, m in stock.named_modules() if name}
    found = {name: (type(m).__name__, m.training) for name, m in lean.named_modules() if name}
    for name in wanted.keys() | found.keys():
        if wanted.get(name) != found.get(name):
            yield f"module {name}: {found.get(name)}, not {wanted.get(name)}"
    if stock.training != lean.training:
        yield f"training: {lean.training}, not {stock.training}"
    hooked = [name for name, hook in lean.hook_dict.items() if hook.fwd_hooks or hook.bwd_hooks]
    if hooked:
        yield f"hooks are left on {hooked}"


def _cfg_apart(
    stock: HookedTransformer, lean: HookedTransformer, apart: Collection[str]
) -> Iterator[str]:
    wanted, found = stock.cfg.to_dict(), lean.cfg.to_dict()
    for name in sorted((wanted.keys() | found.keys()) - set(apart)):
        if wanted.get(name, "absent") != found.get(name, "absent"):
            one, other = wanted.get(name, "absent"), found.get(name, "absent")
            yield f"cfg.{name}: {other!r}, not {one!r}"


def run(model: HookedTransformer, case_id: str) -> tuple[torch.Tensor, Cache]:
    """Logits and the full cache on the tokens of a case."""
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens(case_id))
    return logits, dict(cache)


def log_probs(model: HookedTransformer, case_id: str) -> torch.Tensor:
    """Log-probabilities on the tokens of a case."""
    with torch.no_grad():
        return reference.log_probs(model(tokens(case_id)))


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of a model's state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: Mapping[str, torch.Tensor], model: torch.nn.Module) -> list[str]:
    """Names whose values are not, bit for bit, what they were; or that came or went."""
    after = model.state_dict()
    return [
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not torch.equal(before[name], after[name])
    ]
