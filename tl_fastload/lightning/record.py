"""Which pretrained model stands in a module: a record of it, and how two records differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tl_fastload.errors import CheckpointError
from tl_fastload.ground.mark import require_whole
from tl_fastload.ground.words import listed
from tl_fastload.ground.wrappers import plain_name
from tl_fastload.lightning.fingerprint import differing, fingerprint, parameters_of
from tl_fastload.placement.values_here import require_here
from tl_fastload.report.load_report import LoadReport

_FORMAT = 1


def record_of(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What a checkpoint says of its frozen submodules, as values that
    `torch.load(weights_only=True)` reads.

    Args:
        modules: name in the Lightning module -> submodule.

    Raises:
        ArgumentError: values are elsewhere (offloaded, sharded, on meta).
        HalfWrittenError: a step in place was interrupted in a submodule.
    """
    for name, module in modules.items():
        require_whole(module, f"The record of {name}")
        require_here(module, f"The record of {name}")
    records = {
        name: {"loads": _loads(module), "weights": fingerprint(parameters_of(module))}
        for name, module in modules.items()
    }
    return {"format": _FORMAT, "submodules": records}


@contextmanager
def _readable() -> Iterator[None]:
    """Let a function that reads a record say that the record is damaged."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            "The checkpoint's record of frozen submodules is damaged "
            f"({type(error).__name__}: {str(error)[:200]}). Nobody can tell whether it was "
            "trained beside this model; use a checkpoint that was not altered."
        ) from error


@_readable()
def differences(record: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> list[str]:
    """How the submodules that stand here differ from those of a record, one sentence each.

    A submodule that the record does not name is left out.

    Raises:
        CheckpointError: a newer version wrote the record, or it is damaged.
    """
    if record["format"] > _FORMAT:
        raise CheckpointError(
            f"The checkpoint's record of frozen submodules has format {record['format']}, this "
            f"tl_fastload reads up to {_FORMAT}. Install a newer one."
        )
    found = []
    for name, saved in record["submodules"].items():
        if name not in modules:
            continue
        present = record_of({name: modules[name]})["submodules"][name]
        for place in saved["loads"].keys() & present["loads"].keys():
            whole = f"{name}.{place}" if place else name
            found += _load_differences(whole, saved["loads"][place], present["loads"][place])
        found += _weight_differences(name, saved["weights"], present["weights"])
    return found


def tensor_differences(
    saved: Mapping[str, torch.Tensor], name: str, module: nn.Module
) -> list[str]:
    """How a submodule differs from the tensors that a full checkpoint has of it.

    Args:
        saved: names within the submodule -> the checkpoint's values, buffers included.
        name: the submodule's name in the Lightning module.
        module: the submodule.
    """
    buffers = {plain_name(buffer) for buffer, _ in module.named_buffers()}
    theirs = {key: value for key, value in saved.items() if key not in buffers}
    return _weight_differences(name, fingerprint(theirs), fingerprint(parameters_of(module)))


@_readable()
def describe(record: Mapping[str, Any]) -> str:
    """The models of a record in a line, as their load reports told them."""
    lines = []
    for name, saved in record["submodules"].items():
        for place, load in saved["loads"].items():
            whole = f"{name}.{place}" if place else name
            lines.append(f"{whole} = {_source(load)}")
    return "; ".join(lines)


def _loads(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The lean loads in a module: name of the loaded part -> where it came from and how."""
    loads = {}
    for name, part in module.named_modules():
        report = getattr(part, "load_report", None)
        if isinstance(report, LoadReport):
            loads[plain_name(name)] = {
                "source": report.source,
                "revision": report.revision,
                "processing": [step for step, text in report.processing.items() if text == "done"],
                "dtype": str(report.dtype).removeprefix("torch."),
                "quantization": (report.quantization or "none").partition(",")[0],
            }
    return loads


def _load_differences(name: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    found = []
    # A folder may lie elsewhere on another machine, so there the weights alone decide.
    if saved["revision"] is not None and here["revision"] is not None:
        repos = [load["source"].rpartition("@")[0] for load in (saved, here)]
        if repos[0] != repos[1] or saved["revision"] != here["revision"]:
            found.append(f"{name} comes from {_source(here)}, was {_source(saved)}")
    for field in ("processing", "dtype", "quantization"):
        if saved[field] != here[field]:
            was, now = (_text(load[field]) for load in (saved, here))
            found.append(f"{field} of {name} is {now}, was {was}")
    return found


def _weight_differences(name: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    names = differing(saved, here)
    if not names:
        return []
    return [f"weights of {name} differ in {len(names)} parameters: {listed(names, 5)}"]


def _source(load: Mapping[str, Any]) -> str:
    commit = f" (commit {load['revision']})" if load["revision"] else ""
    return f"{load['source']}{commit}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ", ".join(value) or "none"
