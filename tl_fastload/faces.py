"""The lean class of each road, found by name, and what is done with the one that is installed."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from tl_fastload.copies.manifest import is_copy, read_manifest
from tl_fastload.face import Face
from tl_fastload.ground import compat
from tl_fastload.ground.paths import expanded
from tl_fastload.planning.plan import LoadPlan

_CLASSES = {
    "hooked": ("tl_fastload.model", "LeanHookedTransformer"),
    "bridge": ("tl_fastload.bridge_model", "LeanTransformerBridge"),
}
ROADS = tuple(_CLASSES)


def installed() -> tuple[str, ...]:
    """The roads that the installed TransformerLens has, HookedTransformer's first."""
    has = {"hooked": compat.has_hooked_transformer(), "bridge": compat.has_bridge()}
    return tuple(road for road in _CLASSES if has[road])


def lean_class(road: str | None = None) -> Any:
    """The class that loads lean.

    Args:
        road: of `ROADS`; None for the first that is installed.

    Raises:
        MissingPackageError: the installed TransformerLens does not have it.
    """
    found = road or next(iter(installed()), "hooked")
    module, name = _CLASSES[found]
    return getattr(import_module(module), name)


def road_for(model_name: str) -> str | None:
    """The road that wrote a processed copy, if a name means one; None for anything else.

    Raises:
        CheckpointError: the copy is damaged.
    """
    folder = expanded(Path(model_name))
    if not is_copy(folder):
        return None
    written = f"Lean{read_manifest(folder).road}"
    return next((road for road, (_, name) in _CLASSES.items() if name == written), None)


def plan(model_name: str | Path | PretrainedConfig, *args: Any, **kwargs: Any) -> LoadPlan:
    """Predict what `from_pretrained_lean` would take, without loading: of `LeanHookedTransformer`
    where the installed TransformerLens has a HookedTransformer, else of `LeanTransformerBridge`.
    `LeanTransformerBridge.plan(...)` plans a bridge anywhere.

    Reads `config.json` and the headers of the weight files. Of a hub name that is not cached,
    these are all that is downloaded (of torch files, which have no header to read alone, the
    sizes).

    Args:
        model_name: TransformerLens name or alias, any hub name, a local folder, a GGUF file, or a
            configuration of transformers. Where there are no weights, planned is what transformers
            would save of such a model, in the dtype that the configuration names.
        *args: as for `from_pretrained_lean`.
        **kwargs: as for `from_pretrained_lean`.

    Returns:
        Sizes, predicted peaks of this load and of TransformerLens' own, whether it fits here, and
        what would if it does not.

    Raises:
        LeanLoadError: what the load itself would raise before it reads weights, but for
            NotEnoughMemory.
    """
    found: LoadPlan = lean_class().plan(model_name, *args, **kwargs)
    return found


plan.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    Face.from_pretrained_lean
).replace(return_annotation=LoadPlan)
