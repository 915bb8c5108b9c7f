"""Adapters that cannot be had, read or merged: errors that name the thing, before weights are
read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.support import adapters, reference
from tests.support.comparison import lean_model
from tl_fastload import (
    AdapterError,
    ArgumentError,
    CheckpointError,
    MissingPackageError,
    UnknownModelError,
)
from tl_fastload.request.adapters import read_adapter_argument
from tl_fastload.source.reader import FileReader

Tensors = dict[str, torch.Tensor]
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(zoo: Any) -> Path:
    folder: Path = zoo("llama-gqa")
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return adapters.for_case("llama-gqa", base, tmp_path / "adapter", target_modules=["q_proj"])


def refusal(
    base: Path, adapter: Any, kind: type[Exception] = AdapterError, **arguments: Any
) -> str:
    with pytest.raises(kind) as caught:
        adapters.lean(base, adapter, **arguments)
    return str(caught.value)


def change(adapter: Path, edit: Callable[[Tensors], Any]) -> Path:
    tensors = adapters.read(adapter)
    edit(tensors)
    (adapter / "adapter_model.safetensors").unlink()
    adapters.save_file(tensors, adapter / "adapter_model.safetensors")
    return adapter


def set_field(adapter: Path, **fields: Any) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return adapter


@pytest.mark.parametrize(
    ("asked", "read"),
    [
        (None, ()),
        ("a", (("a", 1.0),)),
        (Path("a/b"), (("a/b", 1.0),)),
        (["a", "b"], (("a", 1.0), ("b", 1.0))),
        ([("a", 0.5), "b"], (("a", 0.5), ("b", 1.0))),
        (("a", 2), (("a", 2.0),)),
    ],
)
def test_ways_to_name_adapters(asked: Any, read: Any) -> None:
    assert read_adapter_argument(asked) == read


@pytest.mark.parametrize(
    "asked", [3, "", [], [("a", "b", "c")], [("a", float("nan"))], [("a", True)], {"a": 1}, [None]]
)
def test_arguments_that_name_none(base: Path, asked: Any) -> None:
    assert "adapter=" in refusal(base, asked, ArgumentError)


def test_without_peft(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert 'pip install "peft>=0.11"' in refusal(base, adapter, MissingPackageError)


def test_places_without_an_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert "no adapter_config.json" in refusal(base, base, CheckpointError)
    assert "There is no folder" in refusal(base, tmp_path / "none", UnknownModelError)
    message = refusal(base, "org/none@v2", UnknownModelError)
    assert "adapter 'org/none@v2'" in message
    assert "v2" in message
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors nor adapter_model.bin" in refusal(
        base, adapter, CheckpointError
    )
    (adapter / "adapter_config.json").write_text("{")
    assert "is not valid JSON" in refusal(base, adapter)


OTHER_KINDS = {
    "IA3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "LOHA": peft.LoHaConfig(target_modules=["q_proj"]),
    "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_adapters(base: Path, tmp_path: Path, kind: str) -> None:
    OTHER_KINDS[kind].save_pretrained(tmp_path)
    message = refusal(base, tmp_path)
    assert kind in message
    assert str(tmp_path) in message


@pytest.mark.parametrize(
    "fields",
    [
        {"alora_invocation_tokens": [1]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"use_qalora": True},
        {"a_field_of_tomorrow": 2.0},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_settings_that_cannot_be_merged(base: Path, adapter: Path, fields: dict[str, Any]) -> None:
    assert next(iter(fields)) in refusal(base, set_field(adapter, **fields))


@pytest.mark.parametrize("initial", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_initialisations_that_changed_the_base(base: Path, adapter: Path, initial: str) -> None:
    message = refusal(base, set_field(adapter, init_lora_weights=initial))
    assert "path_initial_model_for_weight_conversion" in message
    assert initial in message


def test_a_rank_that_is_not_the_configurations(base: Path, adapter: Path) -> None:
    message = refusal(base, set_field(adapter, r=4))
    assert "rank 4" in message
    assert "layers.1.self_attn.q_proj" in message


EDITS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "one factor": (lambda t: t.pop(f"{LAYER}.lora_B.weight"), "missing: model.layers.0"),
    "a module": (
        lambda t: [t.pop(f"{LAYER}.lora_{k}.weight") for k in "AB"],
        "lora_A and lora_B of model.layers.0.self_attn.q_proj, which target_modules",
    ),
    "shape": (
        lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(3, 5)}),
        "misshapen: the update of model.layers.0.self_attn.q_proj is",
    ),
    "no such module": (
        lambda t: t.update(
            {
                "base_model.model.model.layers.9.x.lora_A.weight": torch.ones(3, 4),
                "base_model.model.model.layers.9.x.lora_B.weight": torch.ones(4, 3),
            }
        ),
        "no such module in the model: model.layers.9.x",
    ),
    "unknown part": (
        lambda t: t.update({f"{LAYER}.lora_diag.weight": torch.ones(3)}),
        "unknown: base_model.model.model.layers.0.self_attn.q_proj.lora_diag.weight",
    ),
    "no such tensor": (
        lambda t: t.update({"base_model.model.head.weight": torch.ones(3)}),
        "no such tensor in the model: head.weight",
    ),
    "another vocabulary": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(3, 36)}),
        "misshapen: lm_head.weight is (3, 36)",
    ),
    "integers": (
        lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(3, 36, dtype=torch.int8)}),
        "holds torch.int8",
    ),
    "a length without DoRA": (
        lambda t: t.update({f"{LAYER}.lora_magnitude_vector": torch.ones(36)}),
        "without use_dora",
    ),
    "a bias without a bias": (
        lambda t: t.update({f"{LAYER}.lora_B.bias": torch.ones(36)}),
        "has a bias, but the module has none",
    ),
    "everything": (lambda t: t.clear(), "no tensors"),
}


@pytest.mark.parametrize("name", EDITS)
def test_tensors_that_do_not_fit(base: Path, adapter: Path, name: str) -> None:
    edit, words = EDITS[name]
    if name == "everything":
        kind: type[Exception] = CheckpointError
    else:
        kind = AdapterError
    message = refusal(base, change(adapter, edit), kind)
    assert words in message
    assert str(adapter) in message


def test_an_adapter_of_another_model(zoo: Any, base: Path, tmp_path: Path) -> None:
    other = zoo("qwen2")
    of_other = adapters.for_case("qwen2", other, tmp_path / "of-qwen2", bias="all")
    message = refusal(base, of_other)
    assert "misshapen" in message or "no such" in message
    assert f"it names {other} as its base" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": None},
        {"lora_alpha": "x"},
        {"r": 0},
        {"alpha_pattern": {"(": 9}},
        {"rank_pattern": {"*": 9}},
        {"target_modules": "("},
    ],
    ids=repr,
)
def test_settings_that_mean_nothing(base: Path, adapter: Path, fields: dict[str, Any]) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    refusal(base, adapter)


def test_dora_without_its_lengths(base: Path, adapter: Path) -> None:
    message = refusal(base, set_field(adapter, use_dora=True))
    assert "missing: model.layers.0.self_attn.q_proj.lora_magnitude_vector" in message


def test_what_has_no_weight(base: Path, tmp_path: Path) -> None:
    dora = adapters.for_case("llama-gqa", base, tmp_path / "dora", use_dora=True)
    assert "DoRA has no weight but 1" in refusal(base, [(dora, 0.5)])
    saved = adapters.for_case("llama-gqa", base, tmp_path / "saved", modules_to_save=["lm_head"])
    assert "replaced, so with no weight but 1" in refusal(base, [(saved, 0.5)])
    assert "replaced by" in refusal(base, [saved, saved])


def test_nothing_is_read_before_an_error(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Any] = []
    monkeypatch.setattr(FileReader, "read", lambda self, *a: reads.append(a))
    refusal(base, set_field(adapter, r=4))
    assert not reads


def test_hf_models_that_cannot_be_merged(base: Path, adapter: Path) -> None:
    model = adapters.attached("llama-gqa", base, adapter)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merge_and_unload"):
        lean_model(base, hf_model=model)
    prompt = peft.get_peft_model(reference.hf_model("llama-gqa", base), OTHER_KINDS["IA3"])
    with pytest.raises(AdapterError, match="IA3"):
        lean_model(base, hf_model=prompt)


def test_toy_models_have_no_adapters(zoo: Any, adapter: Path) -> None:
    assert "TransformerLens' own" in refusal(zoo("gelu"), adapter, ArgumentError)


def test_a_folder_of_an_adapter_alone(adapter: Path) -> None:
    with pytest.raises(CheckpointError, match="base model with adapter="):
        lean_model(adapter)
