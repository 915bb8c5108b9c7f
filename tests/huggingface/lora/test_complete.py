"""An adapter that lacks what its configuration names, or holds more: peft loads what fits, and
says nothing of the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import adapters
from tl_fastload import AdapterError

CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "a saved module": (
        "llama-gqa",
        {"modules_to_save": ["lm_head"]},
        "lm_head",
        "missing: the weights of lm_head, which modules_to_save",
    ),
    "all biases": ("phi", {"bias": "all"}, "bias", r"missing: trained biases.*bias='all'"),
    "biases": (
        "phi",
        {"bias": "lora_only", "target_modules": ["q_proj"]},
        "bias",
        r"missing: trained biases.*q_proj\.bias.*bias='lora_only'",
    ),
    "rows of tokens": (
        "llama-gqa",
        {"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]},
        "token",
        "missing: the rows of trainable_token_indices",
    ),
    "experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
        "layers.1.mlp",
        r"missing: .*layers\.1\.mlp\.experts\.down_proj, which target_parameters",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_missing(name: str, zoo: Any, tmp_path: Path) -> None:
    case_id, options, dropped, words = CASES[name]
    base = zoo(case_id)
    whole = adapters.for_case(case_id, base, tmp_path / "adapter", **options)
    adapters.lean(base, whole)
    tensors = adapters.read(whole)
    kept = {key: value for key, value in tensors.items() if dropped not in key}
    assert len(kept) < len(tensors)
    adapters.save_file(kept, whole / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=words):
        adapters.lean(base, whole)


@pytest.mark.parametrize(
    "fields", [{"target_modules": ["q_proj"]}, {"layers_to_transform": [0]}], ids=repr
)
def test_what_is_not_targeted(fields: dict[str, Any], zoo: Any, tmp_path: Path) -> None:
    base = zoo("llama-gqa")
    whole = adapters.for_case(
        "llama-gqa", base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"]
    )
    written = adapters.write(
        tmp_path / "other",
        adapters.read(whole),
        **{"target_modules": ["q_proj", "v_proj"], **fields},
    )
    with pytest.raises(AdapterError, match=r"an update of .*, which the configuration does not"):
        adapters.lean(base, written)
