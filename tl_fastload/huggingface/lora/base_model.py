"""Whether LoRA adapters were trained on the model that they are merged into, as far as the name of
their base model tells: weights of another model's shape say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl_fastload.errors import AdapterError
from tl_fastload.huggingface.lora.adapter import Adapter, base_of
from tl_fastload.source.choose import SAFETENSORS, TORCH_SUFFIXES

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@.+)?")
_HUB_CACHE = re.compile(r"models--(?:.+--)?([^/\\]+)[/\\]snapshots[/\\]")
# What says nothing about the weights: what quantizing uploaders append (the adapter fits the
# unquantized model, too), and what Meta's repositories began with before they were renamed.
_BESIDES = re.compile(r"^meta-(?=llama)|(-unsloth)?-bnb-[48]bit$")
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def compare_bases(
    adapters: Sequence[Adapter], names: Sequence[str], aliases: Sequence[Any], *, check: bool
) -> list[str]:
    """Compare the base model that each adapter names with the model at hand.

    The last parts of names are compared, as paths and organisations differ. A name that differs is
    an error if it is known to mean another model: both are hub names, or both are folders that are
    here, with files of the same names and sizes and other contents. Otherwise (the same weights
    in another dtype are other files, too) it is worth a note.

    Args:
        adapters: what is merged; all of it fits in shape.
        names: what the model certainly is: its folder, repository, official name.
        aliases: what it may be called besides; None and repetitions are skipped.
        check: whether another base model is an error.

    Returns:
        A note for each adapter that names a base model of an unknown relation.

    Raises:
        AdapterError: an adapter's base is another model.
    """
    known = {_last(str(name)) for name in (*names, *aliases) if name}
    notes = []
    for adapter in adapters:
        base = base_of(adapter)
        if base is None or _last(base) in known:
            continue
        if check and any(_are_different(base, name) for name in names):
            raise AdapterError(
                f"The adapter {adapter.label} was trained on {base}, and this is "
                f"{' or '.join(dict.fromkeys(names))}, which it fits only in shape: the sum would "
                "be the weights of neither. Load that base model, or pass check_base=False if both "
                "are the same model, or to merge all the same."
            )
        notes.append(f"{adapter.label} names {base} as its base model; its shapes fit this one")
    return notes


def _last(name: str) -> str:
    in_cache = _HUB_CACHE.search(name)
    last = in_cache[1] if in_cache else re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return _BESIDES.sub("", last.partition("@")[0].lower())


def _are_different(base: str, name: str) -> bool:
    """Whether two names that differ certainly mean two models."""
    folders = Path(base).is_dir(), Path(name).is_dir()
    if all(folders):
        return _hold_other_weights(Path(base), Path(name))
    return not any(folders) and all(_HUB_NAME.fullmatch(one) for one in (base, name))


def _hold_other_weights(one: Path, other: Path) -> bool:
    """Whether two folders have the same weight files, as large, and not with the same in them."""
    files, others = _weights(one), _weights(other)
    sizes, other_sizes = (
        {name: path.stat().st_size for name, path in some.items()} for some in (files, others)
    )
    return sizes == other_sizes and any(
        _samples(path) != _samples(others[name]) for name, path in files.items()
    )


def _weights(folder: Path) -> dict[str, Path]:
    suffixes = (SAFETENSORS, *TORCH_SUFFIXES)
    return {path.name: path for path in folder.iterdir() if path.suffix in suffixes}


def _samples(path: Path) -> list[bytes]:
    """Pieces from all over a file."""
    last = max(path.stat().st_size - _SAMPLE_BYTES, 0)
    pieces = []
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(last * number // (_SAMPLES - 1))
            pieces.append(file.read(_SAMPLE_BYTES))
    return pieces
