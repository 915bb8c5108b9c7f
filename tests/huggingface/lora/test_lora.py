"""`adapter=`: the numbers of peft's `merge_and_unload` followed by stock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import adapters, reference
from tests.support import zoo as zoo_module
from tests.support.comparison import changed, lean_model, values

CASES = ["gpt2", "neox", "llama-gqa", "mixtral", "bloom", "phi3", "gemma2"]
MORE_CASES = """
    gpt-neo opt gptj llama-gqa1-tied mistral qwen2 qwen3 phi phi3-gqa gemma gemma3 olmo olmo2 olmo3
    olmoe apertus gpt-oss
""".split()
_BOUND = 1e-6


def _compare(
    zoo: Any, tmp_path: Path, case_id: str, flags: dict[str, Any] | None = None, **config: Any
) -> Any:
    """Assert that a lean load with an adapter has stock's numbers; returns the lean model."""
    folder, flags = zoo(case_id), flags or {}
    adapter = adapters.for_case(case_id, folder, tmp_path / "adapter", **config)
    hf = adapters.merged_by_peft(case_id, folder, adapter)
    stock = adapters.stock_of(case_id, hf, tmp_path / "merged", **flags)
    if case_id == "gpt-oss":
        flags = {**flags, "fold_value_biases": False}
    lean = adapters.lean(folder, adapter, **flags)
    assert max(adapters.gaps(lean, stock).values(), default=0) <= _BOUND
    plain = lean_model(folder, **flags)
    assert adapters.gaps(lean, plain), "the adapter changed nothing"
    return lean


@pytest.mark.parametrize("case_id", CASES)
def test_merged_as_peft_does(zoo: Any, tmp_path: Path, case_id: str) -> None:
    _compare(zoo, tmp_path, case_id)


@pytest.mark.slow
@pytest.mark.parametrize("case_id", MORE_CASES)
def test_merged_as_peft_does_in_other_architectures(zoo: Any, tmp_path: Path, case_id: str) -> None:
    _compare(zoo, tmp_path, case_id)


@pytest.mark.parametrize("case_id", ["gpt2", "neox", "llama-gqa"])
def test_without_processing(zoo: Any, tmp_path: Path, case_id: str) -> None:
    _compare(zoo, tmp_path, case_id, reference.NO_PROCESSING)


CONFIGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"layers.0.*.q_proj": 5, "down_proj": 2},
        "alpha_pattern": {"q_proj": 7, r".*\.1\..*v_proj": 11},
    },
    "regex": {"target_modules": r".*\.(0|1)\.self_attn\.(q|o)_proj"},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "not that one": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.0\..*"},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "both embeddings": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "a norm": {"modules_to_save": ["input_layernorm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "unembedding": {"target_modules": ["lm_head"]},
    "dora of an embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "tokens": {"trainable_token_indices": [3, 0, 7]},
    "tokens by name": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "saved in bfloat16": {"dtype": torch.bfloat16},
}


# The slow ones vary these.
OFTEN = ("rslora", "dora", "patterns", "modules to save", "embedding", "tokens by name")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in OFTEN else pytest.mark.slow) for n in CONFIGS]
)
def test_each_setting(zoo: Any, tmp_path: Path, name: str) -> None:
    _compare(zoo, tmp_path, "llama-gqa", **CONFIGS[name])


ON_EMBEDDINGS = ["modules to save", "both embeddings", "embedding", "tokens"]


@pytest.mark.parametrize("name", ON_EMBEDDINGS)
def test_embeddings_that_are_tied(zoo: Any, tmp_path: Path, name: str) -> None:
    _compare(zoo, tmp_path, "llama-gqa1-tied", **CONFIGS[name])


CONV1D: dict[str, dict[str, Any]] = {
    "told so": {"fan_in_fan_out": True},
    "dora": {"use_dora": True, "fan_in_fan_out": True},
    "all biases": {"bias": "all"},
    "lora biases": {"bias": "lora_only"},
    "bias of B": {"lora_bias": True},
    "positions": {"target_modules": ["wpe", "wte", "c_attn"]},
}


@pytest.mark.parametrize("name", CONV1D)
def test_gpt2(zoo: Any, tmp_path: Path, name: str) -> None:
    _compare(zoo, tmp_path, "gpt2", **CONV1D[name])


def test_stacked_experts_by_parameter(zoo: Any, tmp_path: Path) -> None:
    _compare(
        zoo,
        tmp_path,
        "gpt-oss",
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )


def test_experts_that_were_modules_of_their_own(zoo: Any, tmp_path: Path) -> None:
    """Adapters from transformers 4, whose names are those of the checkpoint's files."""
    folder = zoo("mixtral")
    tensors = {}
    for name, weight in zoo_module.read_weights(folder).items():
        module = name.removesuffix(".weight")
        if module.endswith(("q_proj", ".w1", ".w2", ".w3")):
            out, inputs = weight.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(3, inputs)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, 3)
    assert any(".w1." in name for name in tensors)
    targets = ["q_proj", "w1", "w2", "w3"]
    adapter = adapters.write(tmp_path / "adapter", tensors, target_modules=targets)
    hf = adapters.merged_by_peft("mixtral", folder, adapter)
    stock = adapters.stock_of("mixtral", hf, tmp_path / "merged")
    lean = adapters.lean(folder, adapter)
    assert max(adapters.gaps(lean, stock).values(), default=0) <= _BOUND
    assert f"LoRA of {len(tensors) // 2} matrices" in lean.load_report.adapters[0]


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_bfloat16_rounds_where_peft_rounds(
    zoo: Any, tmp_path: Path, case_id: str, config: dict[str, Any]
) -> None:
    folder = zoo(case_id)
    adapter = adapters.for_case(case_id, folder, tmp_path / "adapter", **config)
    hf = adapters.merged_by_peft(case_id, folder, adapter, dtype=torch.bfloat16)
    hf.save_pretrained(tmp_path / "merged")
    merged = lean_model(tmp_path / "merged", dtype="bfloat16")
    assert not adapters.gaps(adapters.lean(folder, adapter, dtype="bfloat16"), merged)


def test_several_adapters_add_up_by_weight(zoo: Any, tmp_path: Path) -> None:
    """As peft's `add_weighted_adapter(..., combination_type="cat")`, merged."""
    folder = zoo("llama-gqa")
    one = adapters.for_case("llama-gqa", folder, tmp_path / "one", seed=1)
    two = adapters.for_case("llama-gqa", folder, tmp_path / "two", seed=2, r=2, use_rslora=True)
    model = adapters.attached("llama-gqa", folder, one, two)
    model.add_weighted_adapter(["0", "1"], [0.5, 0.25], "sum", combination_type="cat")
    model.set_adapter("sum")
    stock = adapters.stock_of("llama-gqa", model.merge_and_unload(), tmp_path / "merged")
    lean = adapters.lean(folder, [(one, 0.5), (str(two), 0.25)])
    assert max(adapters.gaps(lean, stock).values(), default=0) <= _BOUND
    assert [line.split(" times ")[1][:4] for line in lean.load_report.adapters] == ["0.5 ", "0.25"]


def test_several_without_weights_are_merged_in_turn(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("gpt2")
    names = [
        adapters.for_case("gpt2", folder, tmp_path / str(n), seed=n, use_dora=bool(n))
        for n in range(2)
    ]
    stock = adapters.stock_of(
        "gpt2", adapters.merged_by_peft("gpt2", folder, *names), tmp_path / "merged"
    )
    lean = adapters.lean(folder, names)
    assert max(adapters.gaps(lean, stock).values(), default=0) <= _BOUND


def test_negative_weights_take_an_adapter_away(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("llama-gqa")
    adapter = adapters.for_case("llama-gqa", folder, tmp_path / "adapter")
    lean = adapters.lean(folder, [adapter, (adapter, -1)])
    assert max(adapters.gaps(lean, lean_model(folder)).values(), default=0) < 1e-5


def test_into_hf_model_which_stays_as_it_was(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("gpt2")
    adapter = adapters.for_case("gpt2", folder, tmp_path / "adapter")
    hf = reference.hf_model("gpt2", folder)
    before = values(hf)
    lean = lean_model(folder, hf_model=hf, adapter=adapter)
    assert not changed(before, hf)
    assert not adapters.gaps(lean, adapters.lean(folder, adapter))


LIVE: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "saved modules and biases": {"modules_to_save": ["ln_f", "lm_head"], "bias": "all"},
    "embedding": {"target_modules": ["wte", "c_proj"]},
    "tokens": {"trainable_token_indices": [4, 2]},
}


@pytest.mark.parametrize("name", LIVE)
def test_hf_model_that_carries_its_adapter(zoo: Any, tmp_path: Path, name: str) -> None:
    folder = zoo("gpt2")
    adapter = adapters.for_case("gpt2", folder, tmp_path / "adapter", **LIVE[name])
    model = adapters.attached("gpt2", folder, adapter)
    before = values(model)
    lean = lean_model(folder, hf_model=model)
    assert not changed(before, model)
    assert type(model.base_model.model.transformer.h[0].mlp.c_proj).__module__.startswith("peft")
    stock = adapters.stock_of("gpt2", model.merge_and_unload(), tmp_path / "merged")
    assert max(adapters.gaps(lean, stock).values(), default=0) <= _BOUND
    assert "'0' of hf_model" in lean.load_report.adapters[0]


def test_hf_model_whose_adapters_are_switched_off(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("gpt2")
    adapter = adapters.for_case("gpt2", folder, tmp_path / "adapter", modules_to_save=["ln_f"])
    model = adapters.attached("gpt2", folder, adapter)
    with model.disable_adapter():
        lean = lean_model(folder, hf_model=model)
    assert not adapters.gaps(lean, lean_model(folder))
    assert lean.load_report.adapters == ()


def test_quantize_comes_after_the_merge(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("llama-gqa")
    adapter = adapters.for_case("llama-gqa", folder, tmp_path / "adapter")
    adapters.merged_by_peft("llama-gqa", folder, adapter).save_pretrained(tmp_path / "merged")
    wanted = lean_model(tmp_path / "merged", quantize="8bit").state_dict()
    found = adapters.lean(folder, adapter, quantize="8bit").state_dict()
    for name, value in wanted.items():
        assert torch.equal(torch.Tensor.dequantize(found[name]), torch.Tensor.dequantize(value))


def test_torch_files_and_checkpoints_in_shards(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("llama-gqa")
    adapter = adapters.for_case("llama-gqa", folder, tmp_path / "adapter")
    wanted = adapters.lean(folder, adapter)
    tensors = adapters.read(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    for options in ({"shards": True}, {"bin": True}):
        assert not adapters.gaps(adapters.lean(zoo("llama-gqa", **options), adapter), wanted)


def test_a_model_without_code_in_transformers(zoo: Any, tmp_path: Path) -> None:
    """Only names are known there; the shapes say which way round a weight is."""
    folder = zoo("santacoder")
    name = "transformer.h.0.mlp.c_fc"
    weight = adapters.read(folder, "model.safetensors")[f"{name}.weight"]
    a, b = torch.randn(3, weight.shape[0]), torch.randn(weight.shape[1], 3)  # it is [in, out]
    adapter = adapters.write(
        tmp_path / "adapter",
        {f"base_model.model.{name}.lora_{k}.weight": v for k, v in (("A", a), ("B", b))},
        target_modules=r".*h\.0\.mlp\.c_fc",
    )
    lean = adapters.lean(folder, adapter, **reference.NO_PROCESSING)
    plain = lean_model(folder, **reference.NO_PROCESSING)
    wanted = weight + (b @ a).T * 5 / 3
    assert list(adapters.gaps(lean, plain)) == ["blocks.0.mlp.W_in"]
    assert (lean.blocks[0].mlp.W_in - wanted).norm() <= _BOUND * wanted.norm()
