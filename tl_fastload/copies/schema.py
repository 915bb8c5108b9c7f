"""The types in the JSON of a processed copy, checked before anything is made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from tl_fastload.errors import CheckpointError
from tl_fastload.request.steps import STEPS
from tl_fastload.source import schemas
from tl_fastload.source.json_files import short
from tl_fastload.source.safetensors import MAX_DIMENSIONS
from tl_fastload.source.schemas import (
    COUNT,
    FLAG,
    NOTHING,
    NUMBER,
    OFFSET,
    OFFSETS,
    SIZE,
    TABLE,
    TEXT,
    TEXTS,
    Rule,
    table_of,
)

REMEDY = "Save the copy again, or load the original."
"""What to do about a damaged copy."""

_DTYPE = Rule("a dtype", lambda v: isinstance(v, torch.dtype))
_SIDE = Rule('"left" or "right"', lambda v: v in ("left", "right"))
_TOKENIZER: Mapping[str, Rule] = {"folder": TEXT, "is_fast": FLAG, "padding_side": _SIDE}
_STORED = Rule(
    "a kind with its options",
    lambda v: isinstance(v, list) and len(v) == 2 and TEXT.fits(v[0]) and TABLE.fits(v[1]),
)

_MANIFEST: Mapping[str, Rule] = {
    "copy_id": TEXT,
    "source": TEXT | NOTHING,
    "revision": TEXT | NOTHING,
    "flags": table_of(FLAG),
    "quantization": TABLE | NOTHING,
    "not_quantized": table_of(TEXT),
    "model_class": TEXT,
    "configuration": TABLE,
    "optional": TEXTS,
    "tokenizer": TABLE | NOTHING,
    "parameters": table_of(TABLE),
    "buffers": table_of(TABLE),
    "checksums": table_of(TEXT),
    "files": table_of(TABLE),
    "versions": table_of(TEXT),
}
_LATER: Mapping[str, Rule] = {
    **{"adapters": TEXTS, "hf_config": TABLE | NOTHING, "built": TABLE | NOTHING},
}
_VERSIONS = ("tl_fastload", "torch", "transformers", "transformer_lens")
_VIEW: Mapping[str, Rule] = {
    "tensors": table_of(TEXT),
    "shape": OFFSETS,
    "strides": OFFSETS,
    "requires_grad": FLAG,
    "offset": OFFSET,
    "dtype": _DTYPE | NOTHING,
    "quantized": TABLE | NOTHING,
}
_COUNTS = ("n_layers", "num_experts", "experts_per_token")
_SIZES = (
    *("d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab", "d_vocab_out"),
    *("rotary_dim", "n_key_value_heads"),
)


_CONFIGURATION: Mapping[str, Rule] = {
    **dict.fromkeys(_COUNTS, COUNT | NOTHING),
    **dict.fromkeys(_SIZES, SIZE | NOTHING),
    "dtype": _DTYPE,
}
"""The fields that every model has."""


def check_manifest(values: Mapping[str, Any], label: str) -> None:
    """Check the decoded JSON of a copy.

    Args:
        values: its fields; those of a dtype are one.
        label: the file, for messages.

    Raises:
        CheckpointError: a field is missing, or is not what it must be.
    """

    def check(value: Any, rules: Mapping[str, Rule], where: str, *, required: bool = True) -> None:
        schemas.check(value, rules, f"{label} is damaged{where}", REMEDY, required=required)

    check(values, _MANIFEST, "")
    check(values, _LATER, "", required=False)
    if values.get("built") is not None:
        check(values["built"], {"road": TEXT}, ", built")
    check(values["flags"], dict.fromkeys(STEPS, FLAG), ", flags")
    check(values["versions"], dict.fromkeys(_VERSIONS, TEXT), ", versions")
    check(values["configuration"], _CONFIGURATION, ", configuration", required=False)
    for name, facts in values["files"].items():
        check(facts, {"bytes": OFFSET, "header": TEXT}, f", files, {name}")
    if values["tokenizer"] is not None:
        check(values["tokenizer"], _TOKENIZER, ", tokenizer")
        check(values["tokenizer"], {"files": table_of(TEXT)}, ", tokenizer", required=False)
    for part in ("parameters", "buffers"):
        for name, view in values[part].items():
            check(view, _VIEW, f", {part}, {name}")
            why_not = _why_not(view, values["checksums"])
            if why_not is not None:
                raise CheckpointError(f"{label} is damaged, {part}, {name}: {why_not}. {REMEDY}")


def _why_not(view: Mapping[str, Any], stored: Mapping[str, str]) -> str | None:
    """Why a view whose fields have the right types means nothing, or None."""
    absent = [key for key in view["tensors"].values() if key not in stored]
    if absent:
        return f"there is no tensor {short(absent[0])}"
    if len(view["shape"]) != len(view["strides"]) or len(view["shape"]) > MAX_DIMENSIONS:
        return "its strides do not go with its shape"
    if view["quantized"] is None:
        return None if view["tensors"].keys() == {""} else "it is not made of one tensor"
    return None if _STORED.fits(view["quantized"].get("stored")) else "it does not say what it is"


def check_configuration(values: Mapping[str, Any], declared: type, label: str) -> None:
    """Check the fields of a configuration by the annotations of its class.

    Args:
        values: the fields.
        declared: the dataclass.
        label: the file, for messages.

    Raises:
        CheckpointError: a field is not what it must be.
    """
    rules: dict[str, Rule] = {}
    for item in fields(declared):
        words = set(re.findall(r"\w+", str(item.type)))
        for kind, rule in (("bool", FLAG), ("str", TEXT), ("int", NUMBER), ("float", NUMBER)):
            if kind in words and not words & {"List", "Dict", "Callable", "Tuple"}:
                rules.setdefault(item.name, rule | NOTHING)
    rules = {name: rule for name, rule in rules.items() if name not in _CONFIGURATION}
    schemas.check(values, rules, f"{label} is damaged, configuration", REMEDY, required=False)
