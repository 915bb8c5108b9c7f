"""What is wrong is said before anything is read: what, where, and what to do next."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import reference
from tests.support import zoo as bed
from tests.support.comparison import lean_model
from tl_fastload.errors import (
    ArgumentError,
    CheckpointError,
    LeanLoadError,
    MissingWeightsError,
    UnknownModelError,
    UnsupportedArchitectureError,
)

Tensors = dict[str, torch.Tensor]
Broken = Callable[..., Path]
RAW = reference.NO_PROCESSING


@pytest.fixture
def broken(zoo: Any, tmp_path: Path) -> Broken:
    """`broken(edit, case, **config)`: a copy with other tensors and fields of config.json."""

    def make(
        edit: Callable[[Tensors], Any] | None = None, case: str = "llama", **config: Any
    ) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(zoo(case), folder)
        if edit is not None:
            path = folder / "model.safetensors"
            tensors = {name: value.clone() for name, value in load_file(path).items()}
            edit(tensors)
            path.unlink()
            save_file(tensors, path)
        values = {**json.loads((folder / "config.json").read_text()), **config}
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return make


def refused(
    error: type[LeanLoadError], folder: Any, *parts: str, **arguments: Any
) -> LeanLoadError:
    """Loading fails with this very class, and the message has all parts."""
    with pytest.raises(LeanLoadError) as caught:
        lean_model(folder, **arguments)
    assert type(caught.value) is error
    for part in parts:
        assert part in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gtp2-smal", ("gtp2-smal", "gpt2-small")),
        ("pythia-70n", ("pythia-70m",)),
        ("/nowhere/at/all", ("/nowhere/at/all",)),
        (Path("no-such-folder"), ("no-such-folder",)),
        ("somebody/never-heard-of", ("somebody/never-heard-of",)),
    ],
)
def test_unknown_names(name: Any, parts: Any, no_reading: None) -> None:
    refused(UnknownModelError, name, *parts)


@pytest.mark.parametrize("name", ["", None, 3, b"gpt2"])
def test_what_is_no_name(name: Any) -> None:
    refused(ArgumentError, name, repr(name))


def test_a_folder_without_config(tmp_path: Path) -> None:
    refused(CheckpointError, tmp_path, str(tmp_path), "config.json")


def test_a_folder_without_weights(broken: Broken) -> None:
    folder = broken()
    (folder / "model.safetensors").unlink()
    refused(CheckpointError, folder, str(folder), "model.safetensors")


@pytest.mark.parametrize(
    ("architecture", "parts"),
    [
        ("MambaForCausalLM", ("MambaForCausalLM", "Supported", "LlamaForCausalLM")),
        ("BertForMaskedLM", ("encoder", "HookedEncoder")),
        ("T5ForConditionalGeneration", ("encoder-decoder", "HookedEncoderDecoder")),
        ("HubertModel", ("HookedAudioEncoder",)),
        ("LlamaForSequenceClassification", ("LlamaForCausalLM",)),
    ],
)
def test_architectures(architecture: str, parts: Any, broken: Broken, no_reading: None) -> None:
    folder = broken(architectures=[architecture], model_type="no-such-type")
    refused(UnsupportedArchitectureError, folder, architecture, *parts)


@pytest.mark.parametrize("content", [b"", b'{"a":', b"[1]", b"\xff\xfe", b"null"])
def test_a_config_that_is_no_json_object(content: bytes, broken: Broken) -> None:
    folder = broken()
    (folder / "config.json").write_bytes(content)
    refused(CheckpointError, folder, "config.json")


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": 0},
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"hidden_size": 0},
        {"num_hidden_layers": -1},
        {"vocab_size": "many"},
        {"max_position_embeddings": None},
        {"rms_norm_eps": "small"},
        {"hidden_act": "no-such-function"},
    ],
    ids=str,
)
def test_a_config_with_a_wrong_field(config: Any, broken: Broken, no_reading: None) -> None:
    with pytest.raises(LeanLoadError):
        lean_model(broken(**config))


def test_missing_shards(zoo: Any, tmp_path: Path, no_reading: None) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo("llama", shards=True), folder)
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].unlink()
    shards[2].unlink()
    refused(CheckpointError, folder, shards[0].name, shards[2].name)


def test_an_index_that_points_outside(zoo: Any, tmp_path: Path, no_reading: None) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo("llama", shards=True), folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = "../other/model.safetensors"
    index.write_text(json.dumps(content))
    refused(CheckpointError, folder, "../other/model.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_truncated_files(kept: float, broken: Broken, no_reading: None) -> None:
    path = broken() / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(CheckpointError, path.parent, str(path))


@pytest.mark.parametrize("junk", [b"not a header", b"\xff" * 64, b"\0" * 64, b"PK\x03\x04" * 9])
def test_corrupt_files(junk: bytes, broken: Broken, no_reading: None) -> None:
    path = broken() / "model.safetensors"
    path.write_bytes(junk)
    refused(CheckpointError, path.parent, str(path))


def test_a_half_written_download(broken: Broken) -> None:
    folder = broken()
    (folder / "model.safetensors").rename(folder / "model.safetensors.incomplete")
    refused(CheckpointError, folder, "incomplete")


def test_a_broken_torch_file(zoo: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo("gpt2", bin=True), folder)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:500])
    refused(CheckpointError, folder, "pytorch_model.bin")


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("/tmp/tl-fastload-ran-code",))


def test_code_in_a_torch_file_does_not_run(zoo: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo("gpt2", bin=True), folder)
    torch.save({"wte.weight": Evil()}, folder / "pytorch_model.bin")
    refused(CheckpointError, folder, "pytorch_model.bin")
    assert not Path("/tmp/tl-fastload-ran-code").exists()


def wrong_in_every_way(tensors: Tensors) -> None:
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.down_proj.weight"]
    tensors["extra.weight"] = torch.ones(3)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(3, 4)


ALL_WRONG = (
    "missing: model.norm.weight",
    "missing: model.layers.1.mlp.down_proj.weight",
    "unexpected: extra.weight",
    "misshapen: model.layers.0.mlp.up_proj.weight is (3, 4)",
)


@pytest.mark.parametrize("flags", [{}, RAW, {"strategy": "copy"}], ids=["processed", "raw", "copy"])
def test_all_that_does_not_fit_is_one_error(flags: Any, broken: Broken, no_reading: None) -> None:
    refused(MissingWeightsError, broken(wrong_in_every_way), *ALL_WRONG, **flags)


def test_a_misshapen_unembedding_does_not_hide_what_is_missing(broken: Broken) -> None:
    """Processing stumbles over it first."""

    def edit(tensors: Tensors) -> None:
        wrong_in_every_way(tensors)
        tensors["lm_head.weight"] = torch.ones(3, 4)

    refused(MissingWeightsError, broken(edit), *ALL_WRONG, "lm_head.weight is (3, 4)")


@pytest.mark.parametrize("case", ["gpt2", "neox", "mixtral", "gemma2", "qwen", "santacoder"])
@pytest.mark.parametrize("wrong", ["missing", "misshapen"])
def test_each_weight_counts(wrong: str, case: str, zoo: Any, tmp_path: Path) -> None:
    tensors = bed.read_weights(zoo(case))
    folder = tmp_path / "model"
    shutil.copytree(zoo(case), folder)
    # Buffers of old repositories, and the last layers, which are as the first.
    skipped = [
        name for name in tensors if name.endswith((".attn.bias", "inv_freq")) or ".1." in name
    ]
    if wrong == "missing" and case == "santacoder":
        skipped.append("lm_head.weight")  # tied by the architecture
    unnoticed = []
    for name in [name for name in tensors if name not in skipped]:
        changed = {other: value.clone() for other, value in tensors.items()}
        value = changed.pop(name)
        if wrong == "misshapen":
            changed[name] = torch.ones([size + 1 for size in value.shape])
        (folder / "model.safetensors").unlink()
        save_file(changed, folder / "model.safetensors")
        try:
            lean_model(folder)
            unnoticed.append(name)
        except MissingWeightsError:
            pass
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            unnoticed.append(f"{name}: {type(error).__name__} {error}")
    assert unnoticed == []


def test_missing_layers_and_layers_too_many(broken: Broken) -> None:
    folder = broken(num_hidden_layers=5)
    refused(MissingWeightsError, folder, "missing: model.layers.4.mlp.down_proj.weight")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    refused(MissingWeightsError, folder, "model.layers.1.mlp.down_proj.weight")


@pytest.mark.parametrize("flags", [{}, RAW, {"strategy": "copy"}], ids=["processed", "raw", "copy"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("weight", "parameter"),
    [
        ("model.layers.0.mlp.up_proj.weight", "blocks.0.mlp.W_in"),
        ("model.embed_tokens.weight", "embed.W_E"),
    ],
)
def test_values_that_are_not_finite_are_a_note(
    weight: str, parameter: str, value: float, flags: Any, broken: Broken
) -> None:
    model = lean_model(broken(lambda tensors: tensors[weight].view(-1)[3:4].fill_(value)), **flags)
    notes = [note for note in model.load_report.notes if parameter in note]
    assert len(notes) == 1
    assert "NaN" in notes[0]


def test_values_beyond_the_dtype_are_a_note(broken: Broken) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = broken(lambda tensors: tensors[name].fill_(1e30))
    assert not lean_model(folder).load_report.notes
    notes = lean_model(folder, dtype="float16").load_report.notes
    assert any("blocks.0.mlp.W_in" in note for note in notes)


@pytest.mark.parametrize("hf_model", ["gpt2", torch.nn.Linear(2, 2), {"a": 1}])
def test_an_hf_model_that_is_none(hf_model: Any, zoo: Any) -> None:
    refused(ArgumentError, zoo("gpt2"), "hf_model", hf_model=hf_model)


def test_an_hf_model_of_the_wrong_kind(zoo: Any) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    refused(UnsupportedArchitectureError, "bert", "BertModel", hf_model=BertModel(config))


def test_an_hf_model_without_values(zoo: Any) -> None:
    source = reference.hf_model("gpt2", zoo("gpt2")).to("meta")
    refused(CheckpointError, "gpt2", "meta", hf_model=source)


def test_an_hf_model_whose_weights_were_changed_in_shape(zoo: Any) -> None:
    source = reference.hf_model("gpt2", zoo("gpt2"))
    source.transformer.ln_f.weight = torch.nn.Parameter(torch.ones(3))
    before = {name: value.clone() for name, value in source.state_dict().items()}
    with pytest.raises(LeanLoadError):
        lean_model("gpt2", hf_model=source)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())


def bnb_4bit(tensors: Tensors) -> None:
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors.pop(name)
        tensors[name] = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
        tensors[f"{name}.absmax"] = torch.ones(3)
        tensors[f"{name}.quant_map"] = torch.ones(16)
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(9, dtype=torch.uint8)


def bnb_8bit_without_scales(tensors: Tensors) -> None:
    for name in [name for name in tensors if "_proj" in name]:
        tensors[name] = tensors[name].to(torch.int8)


def gptq(tensors: Tensors) -> None:
    for name in [name for name in tensors if "_proj" in name]:
        del tensors[name]
        for part in ("qweight", "qzeros", "g_idx"):
            tensors[name.replace("weight", part)] = torch.zeros(4, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("edit", "method"),
    [(bnb_4bit, "bitsandbytes"), (bnb_8bit_without_scales, "bitsandbytes"), (gptq, "gptq")],
)
def test_quantized_weights_are_not_taken_for_plain_ones(
    edit: Any, method: str, broken: Broken
) -> None:
    """Bytes whose scales are damaged or missing, and formats that are not supported."""
    bits = "load_in_8bit" if edit is bnb_8bit_without_scales else "load_in_4bit"
    folder = broken(edit, quantization_config={"quant_method": method, bits: True})
    with pytest.raises(LeanLoadError, match=r"(?i)quant|scale|SCB"):
        lean_model(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_integers_without_scales_are_no_weights(dtype: torch.dtype, broken: Broken) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = broken(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(LeanLoadError, match=r"up_proj"):
        lean_model(folder)
