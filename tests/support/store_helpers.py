"""Processed copies in tests: the embedded model, and whether a copy is the same one."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.support.comparison import differences, lean_model, run
from tl_fastload import LeanHookedTransformer
from tl_fastload.copies.manifest import MANIFEST, read_manifest
from tl_fastload.embedded_model import embedded_model_path

RAW = dict.fromkeys(
    ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
)


def embedded(**arguments: Any) -> LeanHookedTransformer:
    return lean_model(embedded_model_path(), **arguments)


def assert_same(one: Any, other: Any, case_id: str | None = None) -> None:
    """The same model, bit for bit, and the same logits."""
    apart = differences(one, other)
    assert apart == []
    tokens = torch.arange(3, 14)[None]
    with torch.no_grad():
        wanted, found = (run(m, case_id)[0] if case_id else m(tokens) for m in (one, other))
    assert torch.equal(wanted, found)


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def rewritten(folder: Path, **changes: Any) -> None:
    """Change what a copy says of itself, as if it had been saved so: its weight files agree."""
    before = read_manifest(folder)
    after = replace(before, **changes)
    files = {}
    for name, facts in before.files.items():
        with (folder / name).open("r+b") as file:
            text = file.read(8)
            text += file.read(int.from_bytes(text, "little"))
            old, new = before.model_checksum().encode(), after.model_checksum().encode()
            text = text.replace(old, new)
            file.seek(0)
            file.write(text)
        files[name] = {**facts, "header": hashlib.sha256(text).hexdigest()}
    (folder / MANIFEST).write_text(replace(after, files=files).dumps())
