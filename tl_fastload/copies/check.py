"""Whether what a caller asks for is what a processed copy holds."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from tl_fastload.copies.manifest import Manifest
from tl_fastload.errors import ArgumentError, CheckpointError
from tl_fastload.ground import compat
from tl_fastload.quantized import formats
from tl_fastload.quantized.spec import Spec, as_dtype
from tl_fastload.request.contradictions import CHECKPOINT_ARGUMENTS, device_asked_for
from tl_fastload.request.options import DEFAULT_DTYPE
from tl_fastload.request.steps import STEPS
from tl_fastload.roads.road import Request

_PICKED = (*CHECKPOINT_ARGUMENTS, "hf_model")


def check_road(manifest: Manifest, request: Request, folder: Path) -> None:
    """Raise ArgumentError if a copy is of another of TransformerLens' classes than is loaded."""
    if manifest.road != request.road.name:
        raise ArgumentError(
            f"{folder} is a processed copy of a {manifest.road}, and {request.cls.__name__} loads "
            f"a {request.road.name}: use Lean{manifest.road}, or load the original "
            f"({manifest.source})."
        )


def check_asked_for(manifest: Manifest, cfg: Any, request: Request, folder: Path) -> None:
    """Raise ArgumentError if the caller asks for something else than what was saved."""
    options, arguments, keywords = request.options, request.arguments, request.keywords
    given = arguments["dtype"]
    dtype = arguments.get("torch_dtype", None if given is DEFAULT_DTYPE else given)
    pairs: list[tuple[str, Any, Any]] = [
        ("dtype", None if dtype is None else as_dtype(dtype), cfg.dtype),
        ("first_n_layers", arguments["first_n_layers"], cfg.n_layers),
        ("n_ctx", arguments["n_ctx"], cfg.n_ctx),
        ("quantize", options.quantize, manifest.quantization),
        # Of a copy on the hub it chooses the copy, and says nothing of what was saved.
        ("revision", None if request.copy_at else keywords.hub.get("revision"), manifest.revision),
        *((name, arguments[name], None) for name in _PICKED),
        *((name, value, getattr(cfg, name, None)) for name, value in keywords.overrides.items()),
    ]
    wrong = [(name, asked, saved) for name, asked, saved in pairs if asked not in (None, saved)]
    if options.adapter:
        wrong.append(("adapter", options.adapter, "; ".join(manifest.adapters) or None))
    if options.dequantize and manifest.quantization is not None:
        wrong.append(("dequantize", True, manifest.quantization))
    if wrong:
        name, asked, saved = wrong[0]
        held = "nothing of the kind" if saved is None else f"{name}={_shown(saved)}"
        raise ArgumentError(
            f"{name}={_shown(asked)} was asked for, but {folder} was saved with {held}. Leave the "
            f"argument out, or load the original ({manifest.source}) with it."
            f"{keywords.guess(name) if name in keywords.overrides else ''}"
        )
    if manifest.quantization is not None:
        if not options.assigns:
            raise ArgumentError(
                "Quantized weights are put into the model as they are, which a copying load cannot "
                f'do: use strategy="auto" with torch {compat.ASSIGN_NEEDS_TORCH} or newer.'
            )
        formats.of_kind(manifest.quantization.kind).require_device(device_asked_for(arguments))


def _shown(value: Any) -> str:
    if not isinstance(value, Spec):
        return repr(value) if len(repr(value)) < 80 else f"a {type(value).__name__}"
    plain = type(value)(value.kind)
    others = [item.name for item in fields(value)]
    changed = [n for n in others if getattr(value, n) != getattr(plain, n)]
    return ", ".join([repr(value.kind), *(f"{n}={getattr(value, n)}" for n in changed)])


def check_steps(manifest: Manifest, cfg: Any, request: Request, folder: Path) -> None:
    """Raise ArgumentError if other processing is asked for than was done.

    Processing an unprocessed copy now would round otherwise than processing the original does,
    whose weights have other strides.
    """

    def effective(flags: dict[str, Any]) -> list[str]:
        return [s for s in STEPS if flags[s] and request.road.why_skipped(s, cfg) is None]

    wanted, done = effective(request.arguments), effective(manifest.flags)
    if wanted == done:
        return
    flags = ", ".join(f"{step}={manifest.flags[step]}" for step in STEPS)
    remedy = f"Pass {flags}"
    if not done:
        ways = ("boot_transformers_lean", "from_pretrained_no_processing_lean")
        way = next((way for way in ways if hasattr(request.cls, way)), ways[0])
        remedy = f"Load it with {way} (then process_weights_() processes it)"
    raise ArgumentError(
        f"{folder} was saved with these processing steps: {', '.join(done) or 'none'}; asked for: "
        f"{', '.join(wanted) or 'none'}. {remedy}, or load the original ({manifest.source})."
    )


def check_names(
    model: nn.Module, manifest: Manifest, folder: Path, views: Collection[str] = ()
) -> None:
    """Raise CheckpointError if the class builds other parameters than were saved, but for those
    that are views of saved ones.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    own = {name: parameter for name, parameter in own.items() if name not in views}
    wrong = [f"missing in the copy: {name}" for name in own.keys() - manifest.parameters.keys()]
    wrong += [f"not in the model: {name}" for name in manifest.parameters.keys() - own.keys()]
    wrong += [
        f"{name} is {list(view.shape)} in the copy, {list(own[name].shape)} in the model"
        for name, view in manifest.parameters.items()
        if name in own and own[name].shape != view.shape
    ]
    if wrong:
        written = manifest.versions.get("transformer_lens")
        raise CheckpointError(
            f"{folder} holds a {manifest.model_class} of TransformerLens {written}, whose "
            f"parameters are not those of {type(model).__name__} in {compat.TRANSFORMER_LENS}:\n  "
            + "\n  ".join(sorted(wrong)[:20])
            + "\nLoad it with the class and version that saved it."
        )
