"""Versions of torch, transformers and TransformerLens, and what each allows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from types import FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

from packaging.requirements import Requirement
from packaging.version import Version

from tl_fastload.errors import MissingPackageError
from tl_fastload.ground.borrow import borrow

if TYPE_CHECKING:
    import torch  # takes a second, and a version is known without


def _version(distribution: str) -> Version:
    try:
        return Version(metadata.version(distribution))
    except metadata.PackageNotFoundError:  # not everything here needs TransformerLens
        return Version("0")


TORCH = _version("torch")
TRANSFORMERS = _version("transformers")
TRANSFORMER_LENS = _version("transformer_lens")

__version__ = "0.2.0"

Function = TypeVar("Function", bound=Callable[..., Any])

ASSIGN_NEEDS_TORCH = Version("2.1")


def can_assign() -> bool:
    """Whether this torch has `load_state_dict(..., assign=True)`."""
    return Version(TORCH.base_version) >= ASSIGN_NEEDS_TORCH


def why_no_shards() -> str | None:
    """Why this torch cannot share a model over processes; None if it can. FSDP2 before 2.8 kept
    each unit whole once it had run.
    """
    import torch

    if Version(TORCH.base_version) < Version("2.8"):
        return f"needs torch 2.8 or newer, this is {TORCH}: upgrade torch."
    return None if torch.distributed.is_available() else "needs a torch with torch.distributed."


def can_map_torch_files() -> bool:
    """Whether `torch.load` takes `mmap=True` (torch 2.1 and newer)."""
    return Version(TORCH.base_version) >= Version("2.1")


def dtypes(names: Mapping[str, str]) -> dict[str, torch.dtype]:
    """Those dtypes that this torch has: 8-bit floats came with 2.1, unsigned integers with 2.3.

    Args:
        names: any key -> torch's name.
    """
    import torch

    return {key: getattr(torch, name) for key, name in names.items() if hasattr(torch, name)}


def not_compiled(function: Function) -> Function:
    """Decorator: torch.compile runs the function as it is, with all that it calls."""
    import torch

    compiler: Any = getattr(torch, "compiler", None)  # came with torch 2.1
    made: Function = function if compiler is None else compiler.disable(function)
    return made


def load_torch_file(path: Any, allowed: Collection[Callable[..., Any]], **arguments: Any) -> Any:
    """`torch.load(path, map_location="cpu", weights_only=True)` of a file that may name more
    functions; torch's own list of such functions is that of all threads, and stays as it is.

    Torch before 2.5 has no such list, and refuses such files.

    Args:
        path: the file.
        allowed: the functions.
        **arguments: for `torch.load`.
    """
    from torch import serialization

    load: Any = serialization.load
    unpickler: Any = getattr(serialization, "_weights_only_unpickler", None)
    if hasattr(unpickler, "_get_user_allowed_globals") and isinstance(load, FunctionType):
        own = _unpickler_allowing(unpickler, allowed)
        legacy = borrow(serialization._legacy_load, _weights_only_unpickler=own)
        load = borrow(load, _weights_only_unpickler=own, _legacy_load=legacy)
    return load(path, map_location="cpu", weights_only=True, **arguments)


def _unpickler_allowing(unpickler: Any, allowed: Collection[Callable[..., Any]]) -> Any:
    """Torch's unpickler module with more functions on its list."""
    named = {f"{one.__module__}.{one.__qualname__}": one for one in allowed}

    def user_allowed() -> dict[str, Any]:
        return {**unpickler._get_user_allowed_globals(), **named}

    run = borrow(unpickler.Unpickler.load, _get_user_allowed_globals=user_allowed)
    own = type("Unpickler", (unpickler.Unpickler,), {"load": run})
    load = borrow(unpickler.load, Unpickler=own)
    return SimpleNamespace(**{**vars(unpickler), "Unpickler": own, "load": load})


@cache
def item_bytes(dtype: torch.dtype) -> int:
    """Bytes of one element; `dtype.itemsize` came with torch 2.1."""
    import torch

    return torch.empty(0, dtype=dtype, device="meta").element_size()


def cuda_memory_fraction(index: int) -> float:
    """The part of a CUDA device that this process may take; torch before 2.7 does not tell."""
    import torch

    ask: Any = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if ask is None else float(ask(index))


def multiplies_in_fewer_bits() -> bool:
    """Whether the process lets the CPU multiply float32 matrices in TF32 or bfloat16."""
    import torch

    mkldnn: Any = getattr(torch.backends.mkldnn, "matmul", None)  # came with torch 2.9
    if mkldnn is not None:
        return mkldnn.fp32_precision not in ("none", "ieee")
    return torch.get_float32_matmul_precision() != "highest"


def holders_of(storage: torch.UntypedStorage) -> int:
    """How many tensors and storages share a memory, this one counted; many where torch does not
    tell.
    """
    import torch

    ask: Any = getattr(torch._C, "_storage_Use_Count", None)
    return sys.maxsize if ask is None else int(ask(storage._cdata))


def halves_are_finite(tensor: torch.Tensor) -> bool:
    """Whether a float16 tensor, which is not empty, has neither NaN nor infinite values."""
    import torch

    try:
        extremes = torch.aminmax(tensor)
    except RuntimeError:  # torch 2.0 has no kernel for it on the CPU
        rows = max(1, tensor.shape[0] * (1 << 20) // tensor.numel())
        return all(bool(torch.isfinite(piece).all()) for piece in torch.split(tensor, rows))
    return all(bool(torch.isfinite(extreme)) for extreme in extremes)


# transformers 5 renames and merges checkpoint tensors by a table; version 4 had plain names.
HAS_WEIGHT_CONVERSIONS = TRANSFORMERS.major >= 5

# `process_weights_` of TransformerLens 2 replaces each norm by one without weights, and its steps
# are methods of the model that expect every norm's weights; version 3 keeps unit weights.
REPLACES_NORMS = TRANSFORMER_LENS.major < 3

# Version 3 tells the sides of a matrix apart by their lengths when it folds norms into it.
GUESSES_SIDES = TRANSFORMER_LENS.major >= 3

# Version 2 loads a tokenizer again, by its name, if it does not add BOS tokens already.
RELOADS_TOKENIZERS = TRANSFORMER_LENS.major < 3

# The first Gemma's activation: transformers took `hidden_activation` for it, `hidden_act` since.
GEMMA_1_HAS_HIDDEN_ACTIVATION = Version("4.48") > TRANSFORMERS

# The field of a configuration that holds the model's dtype.
CONFIG_DTYPE_NAME = "dtype" if Version("4.56") <= TRANSFORMERS else "torch_dtype"


def require_hooked_transformer() -> None:
    """Raise MissingPackageError on a TransformerLens that has no HookedTransformer any more, or
    that cannot be imported.
    """
    _require(has_hooked_transformer(), "HookedTransformer", "TransformerBridge", ">=2.8,<4")
    _require_import("transformer_lens")


def has_hooked_transformer() -> bool:
    """Whether the installed TransformerLens has the HookedTransformer."""
    return Version("0") < TRANSFORMER_LENS < Version("4.0.dev0")


@cache
def has_bridge() -> bool:
    """Whether the installed TransformerLens has a TransformerBridge that is known here."""
    found = find_spec("transformer_lens")  # not of a part of it, which would import it
    folders = [] if found is None else found.submodule_search_locations or []
    return any((Path(folder) / "model_bridge" / "sources").is_dir() for folder in folders)


def require_bridge() -> None:
    """Raise MissingPackageError on a TransformerLens that has no TransformerBridge yet, or that
    cannot be imported.
    """
    _require(has_bridge(), "TransformerBridge", "HookedTransformer", ">=3")
    _require_import("transformer_lens.model_bridge")


def _require(is_there: bool, name: str, other: str, versions: str) -> None:
    if not is_there:
        raise MissingPackageError(
            f"TransformerLens {TRANSFORMER_LENS} has no {name}, which Lean{name} loads into. Take "
            f'tl_fastload.Lean{other}, or pip install "transformer-lens{versions}".'
        )


def _require_import(module: str) -> None:
    """Import a module; what is wrong is mostly a package that it imports, bitsandbytes say."""
    try:
        import_module(module)
    except Exception as error:  # whatever a broken installation raises
        frames = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
        names = [name.partition(".")[0] for name in frames if not name.startswith("importlib")]
        culprit = names[-1].replace("_", "-")
        said = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        needed = {Requirement(one).name for one in metadata.requires("transformer_lens") or ()}
        removal = f", or remove it (pip uninstall {culprit}) if nothing needs it"
        raise MissingPackageError(
            f"TransformerLens {TRANSFORMER_LENS} cannot be imported: {culprit} fails ({said}). "
            f"Repair it (pip install --force-reinstall --no-deps {culprit})"
            f"{'' if culprit in {*needed, 'transformer-lens'} else removal}."
        ) from error


@contextmanager
def no_autocast() -> Iterator[None]:
    """No autocasting in this thread, whatever the caller is in."""
    guard: Any = import_module("torch")._C._DisableAutocast()
    if hasattr(guard, "__enter__"):
        with guard:
            yield
        return
    try:
        yield  # torch 2.0: as long as the guard lives
    finally:
        del guard
