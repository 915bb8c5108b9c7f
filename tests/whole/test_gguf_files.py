"""GGUF files as users have them: paths, folders, the hub, split files, tokenizers, copies."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Ggml
from transformers import AutoTokenizer

import tl_fastload
from tests.support import gguf_files as files
from tests.support.comparison import STEPS, lean_model
from tests.support.fake_hub import FakeHub, Repo, point_at
from tl_fastload.errors import (
    ArgumentError,
    CheckpointError,
    LeanLoadError,
    MissingWeightsError,
    QuantizationError,
    UnsupportedArchitectureError,
)
from tl_fastload.quantized import QuantizedTensor, quantize
from tl_fastload.quantized.content import Content

TOKENS = torch.arange(3, 16)[None]
RAW = dict.fromkeys(STEPS, False)


def log_probs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).log_softmax(-1)
    return found


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "m-Q4_K_M.gguf"
    files.write("llama", path, tokens=files.sentencepiece, vocab_size=280)
    return path


@pytest.fixture(scope="module")
def expected(model_file: Path) -> torch.Tensor:
    return log_probs(lean_model(model_file))


def test_a_path_or_a_folder(model_file: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    folder = model_file.parent
    for name, options in (
        (str(model_file), {}),
        (folder, {"gguf_file": model_file.name}),
        (folder, {}),  # the only one that is there
        (folder.parent, {"subfolder": folder.name, "gguf_file": model_file.name}),
    ):
        model = lean_model(name, **options)
        assert torch.equal(log_probs(model), expected)
        assert model.load_report.source == str(model_file)
    assert any("the only model there" in n for n in lean_model(folder).load_report.notes)
    with pytest.raises(CheckpointError, match=r"has no file 'other.gguf'. It has m-Q4_K_M.gguf"):
        lean_model(folder, gguf_file="other.gguf")
    for wrong in ("../m.gguf", "model.safetensors", ""):
        with pytest.raises(ArgumentError, match="gguf_file="):
            lean_model(folder, gguf_file=wrong)
    with pytest.raises(ArgumentError, match="is a GGUF file already"):
        lean_model(model_file, gguf_file="m.gguf")
    with pytest.raises(ArgumentError, match="leave variant= and use_safetensors= out"):
        lean_model(model_file, use_safetensors=True)
    with pytest.raises(ArgumentError, match="gguf_file= names weights"):
        lean_model("gpt2", hf_model=torch.nn.Linear(1, 1), gguf_file="m.gguf")
    with pytest.raises(ArgumentError, match="weights go into new models only"):
        tl_fastload.load_weights_(model, model_file)


def test_the_tokenizer_is_that_of_the_metadata(model_file: Path, tmp_path: Path) -> None:
    byte_level = tmp_path / "b.gguf"
    files.write("qwen2", byte_level, tokens=files.byte_level, vocab_size=270)
    for path in (model_file, byte_level):
        made = lean_model(path).tokenizer
        theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        for text in ("hello world", "  hello\nwé", "hellw"):
            found = made(text, add_special_tokens=False)["input_ids"]
            assert found == theirs(text, add_special_tokens=False)["input_ids"]
            assert made.decode(found) == theirs.decode(found)
        assert (made.bos_token, made.eos_token) == (theirs.bos_token, theirs.eos_token)
        assert made.name_or_path == str(path)
    assert made.chat_template == "{{ messages }}"


def test_without_a_tokenizer(tmp_path: Path) -> None:
    files.write("llama", tmp_path / "m.gguf")
    assert lean_model(tmp_path / "m.gguf").tokenizer is None


def test_split_files(tmp_path: Path) -> None:
    """Metadata in the first file only, tensors in all: as llama.cpp splits."""
    whole = files.write("llama", tmp_path / "whole.gguf")
    reader = gguf.GGUFReader(whole.path)
    half = len(reader.tensors) // 2
    for number, part in enumerate((reader.tensors[:half], reader.tensors[half:])):
        writer = gguf.GGUFWriter(tmp_path / f"s-0000{number + 1}-of-00002.gguf", "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for name, field in reader.fields.items():
            if number == 0 and not name.startswith(("GGUF.", "general.architecture")):
                writer.add_key_value(name, field.contents(), field.types[0])
        for tensor in part:
            data = np.array(tensor.data)
            writer.add_tensor(tensor.name, data, raw_dtype=Ggml(tensor.tensor_type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    expected = log_probs(lean_model(whole.path))
    for number in (1, 2):
        model = lean_model(tmp_path / f"s-0000{number}-of-00002.gguf")
        assert torch.equal(log_probs(model), expected)
    (tmp_path / "s-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 2 .*s-00002-of-00002.gguf"):
        lean_model(tmp_path / "s-00001-of-00002.gguf")


@pytest.fixture
def server(model_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    data = model_file.read_bytes()
    with FakeHub({"org/m-GGUF": Repo({"m-Q4.gguf": data, "README.md": b"x"})}) as fake:
        point_at(monkeypatch, fake.url)
        yield fake


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_the_hub(server: FakeHub, cache: Path, expected: torch.Tensor) -> None:
    options = {"gguf_file": "m-Q4.gguf", "cache_dir": str(cache)}
    with pytest.raises(CheckpointError, match="a plan reads its header"):
        tl_fastload.plan("org/m-GGUF", device="cpu", **options)
    for offline in (False, True):
        model = lean_model("org/m-GGUF", local_files_only=offline, **options)
        assert torch.equal(log_probs(model), expected)
        assert model.tokenizer.name_or_path == "org/m-GGUF"
        assert model.load_report.source == "org/m-GGUF@main/m-Q4.gguf"
    assert tl_fastload.plan("org/m-GGUF", device="cpu", **options).quantization
    with pytest.raises(CheckpointError, match=r"no file 'q.gguf'. It has m-Q4.gguf"):
        lean_model("org/m-GGUF", gguf_file="q.gguf", cache_dir=str(cache))
    with pytest.raises(CheckpointError, match=r"Pass gguf_file= with one of m-Q4.gguf"):
        lean_model("org/m-GGUF", cache_dir=str(cache))


def test_plans_copies_and_the_cache(
    model_file: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    plan = tl_fastload.plan(model_file, device="cpu")
    model = lean_model(model_file, cache=tmp_path / "cache")
    held = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    assert plan.quantization == "gguf, as in the checkpoint"
    assert plan.parameter_bytes["quantized"] == sum(tensor.nbytes_stored() for tensor in held)
    model.save_lean(tmp_path / "copy")
    again = lean_model(tmp_path / "copy")
    assert again.load_report.mapped_bytes == again.load_report.parameter_bytes
    hit = lean_model(model_file.parent, gguf_file=model_file.name, cache=tmp_path / "cache")
    assert str(hit.load_report.cache).startswith("hit")
    for other in (again, hit):
        assert torch.equal(log_probs(other), expected)
        assert other.tokenizer("hello")["input_ids"] == model.tokenizer("hello")["input_ids"]


def _lies_in(path: Path) -> list[tuple[int, int]]:
    """Where the file is mapped in this process."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            first, _, last = line.split()[0].partition("-")
            found.append((int(first, 16), int(last, 16)))
    return found


@pytest.mark.parametrize("case_id", ["llama", "mixtral", "qwen2", "gpt-oss"])
def test_bytes_are_mapped(case_id: str, tmp_path: Path) -> None:
    """But for Llama's queries and keys, whose rows stand in another order in the file."""
    written = files.write(case_id, tmp_path / "m.gguf")
    for flags in (RAW, {}):
        model = lean_model(written.path, **flags)
        spans = _lies_in(written.path)
        held = {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
        apart = set()
        for name, tensor in held.items():
            at = tensor.content.stored.tensors()["packed"].data_ptr()
            if not any(first <= at < last for first, last in spans):
                apart.add(name)
        moved = (
            {n for n in held if n.endswith((".W_Q", "._W_K"))}
            if case_id in files.ROTATED
            else set()
        )
        assert apart == moved
        assert sum(p.nbytes_stored() for p in held.values()) < written.path.stat().st_size * 1.03


def test_embeddings_decode_the_rows_that_are_looked_up(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lean_model(model_file, **RAW)
    decoded: list[tuple[int, int]] = []
    dense = Content.dense

    def spy(content: Content, dtype: torch.dtype) -> torch.Tensor:
        decoded.append(content.stored.shape)
        return dense(content, dtype)

    monkeypatch.setattr(Content, "dense", spy)
    model.embed(torch.tensor([[5, 7, 5]]))
    assert decoded == [(2, 256)]


def test_what_one_does_with_a_model(model_file: Path, expected: torch.Tensor) -> None:
    model = lean_model(model_file)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(log_probs(other), expected)
    other = lean_model(model_file)
    other.load_state_dict(model.state_dict())
    assert torch.equal(log_probs(other), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.W_E.dtype == torch.bfloat16
    assert float((log_probs(half).float() - expected).abs().max()) < 0.5

    seen: dict[str, torch.Tensor] = {}
    keep = ("blocks.0.hook_resid_pre", lambda grad, hook: seen.update({hook.name: grad}))
    with model.hooks(bwd_hooks=[keep]):
        model(TOKENS)[0, -1].max().backward()
    assert float(seen["blocks.0.hook_resid_pre"].abs().max()) > 0
    assert all(p.grad is None for p in model.parameters() if isinstance(p, QuantizedTensor))

    assert model.generate(TOKENS, max_new_tokens=3, verbose=False).shape == (1, 16)
    model.set_use_attn_result(True)
    assert float((log_probs(model) - expected).abs().max()) < 1e-4
    assert model.OV[0, 0].AB.shape == (256, 256)
    shorter = lean_model(model_file, first_n_layers=1)
    assert torch.equal(
        shorter.blocks[0].mlp.W_in.dequantize(), model.blocks[0].mlp.W_in.dequantize()
    )
    with pytest.raises(QuantizationError, match="gguf weights cannot be quantized again"):
        model.blocks[0].mlp.W_in.content.stored.requantize(torch.zeros(2, 256))
    with pytest.raises(QuantizationError, match="can be loaded, but not made"):
        quantize(torch.zeros(2, 256), "gguf")
    with pytest.raises(ArgumentError, match="is quantized already"):
        lean_model(model_file, quantize="nf4")
    again = lean_model(model_file, dequantize=True, quantize="8bit")
    assert again.load_report.quantization == "int8, quantized while loading"


def _refusal(path: Path, error: type[LeanLoadError]) -> str:
    with pytest.raises(error) as caught:
        lean_model(path)
    return str(caught.value)


def _without_key(path: Path, key: str) -> None:
    """Give a key of the metadata another name of the same length."""
    data = path.read_bytes()
    other = key.replace(key[-3:], "xyz").encode()
    assert data.count(key.encode()) == 1
    path.write_bytes(data.replace(key.encode(), other))


def test_what_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    files.write("llama", path)
    _without_key(path, "llama.block_count")
    assert "has no llama.block_count in its metadata" in _refusal(path, CheckpointError)

    files.write("llama", path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))
    message = _refusal(path, MissingWeightsError)
    assert "missing: model.layers.1.mlp.up_proj.weight" in message
    assert "unexpected: blk.1.ffn_xx.weight" in message

    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = _refusal(path, UnsupportedArchitectureError)
    assert re.search("llama.cpp's architecture 'mamba'. Of GGUF files llama, qwen2", message)


def test_a_rotary_scaling_that_is_not_named(tmp_path: Path) -> None:
    written = files.write("llama3-tied", tmp_path / "m.gguf")
    reader = gguf.GGUFReader(written.path)
    table = next(t for t in reader.tensors if t.name == "rope_freqs.weight")
    data = bytearray(written.path.read_bytes())
    data[table.data_offset : table.data_offset + 4] = np.float32(3.0).tobytes()
    written.path.write_bytes(data)
    message = _refusal(written.path, UnsupportedArchitectureError)
    assert "scales rotary frequencies (rope_freqs.weight) in another way than" in message


def test_plain_numbers_are_an_ordinary_model(tmp_path: Path) -> None:
    written = files.write("llama", tmp_path / "m.gguf", lambda number, name: "F16")
    model = lean_model(written.path)
    assert model.load_report.quantization is None
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())
    expected = files.log_probs(written.model, TOKENS)
    assert float((log_probs(model) - expected).abs().max()) < 1e-4
    with pytest.raises(ArgumentError, match="is not quantized: leave dequantize= out"):
        lean_model(written.path, dequantize=True)
