"""Plans of models that have a configuration and no weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.support.commands import flat, run
from tests.support.fake_hub import fill_cache
from tl_fastload import CheckpointError, LoadPlan, faces, plan
from tl_fastload.cli.bench.synthetic import parse_shape, write_checkpoint
from tl_fastload.planning import dry_run

TOLD = ("dtype", "parameter_bytes", "mapped_bytes", "peak_host_bytes", "peak_anonymous_bytes")
STOCK = ("stock_peak_host_bytes", "stock_peak_anonymous_bytes", "strategy", "device")
SHAPE = "llama:d_model=128,n_layers=2,d_vocab=512,dtype=bfloat16"


def told(found: LoadPlan, case_id: str) -> dict[str, Any]:
    # A file has experts one by one, which stock stacks first.
    names = TOLD if case_id == "mixtral" else (*TOLD, *STOCK)
    return {name: getattr(found, name) for name in names}


@pytest.fixture
def bare(tmp_path: Path) -> Any:
    """A copy of a folder's configuration alone."""

    def copied(folder: Path) -> Path:
        target = tmp_path / "bare"
        target.mkdir(exist_ok=True)
        shutil.copy(folder / "config.json", target)
        return target

    return copied


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "mixtral", "neox"])
@pytest.mark.parametrize("arguments", [{}, {"dtype": "bfloat16"}, {"quantize": "nf4"}])
def test_a_configuration_is_planned_as_its_weights_are(
    case_id: str, arguments: dict[str, Any], zoo: Any, bare: Any
) -> None:
    folder = zoo(case_id)
    known, found = (plan(place, device="cpu", **arguments) for place in (folder, bare(folder)))
    assert told(found, case_id) == told(known, case_id)
    assert "no weights, only a configuration" in found.notes[0]
    assert known.notes == found.notes[1:]
    config = transformers.AutoConfig.from_pretrained(folder)
    from_config = plan(config, device="cpu", **arguments)
    assert told(from_config, case_id) == told(known, case_id)
    assert from_config.source == type(config).__name__


@pytest.mark.parametrize("road", faces.installed())
def test_a_shape_is_planned_as_its_checkpoint_is(road: str, tmp_path: Path) -> None:
    write_checkpoint(parse_shape(SHAPE), tmp_path)
    arguments = ("--device", "cpu", "--road", road, "--json", "-")
    known = json.loads(run("plan", tmp_path, *arguments).stdout)
    found = json.loads(run("plan", "--shape", SHAPE, *arguments).stdout)
    assert found["source"] == SHAPE
    for name in (*TOLD, *STOCK):
        assert found[name] == known[name], name


def test_a_choice_is_found_before_the_configuration_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 3 << 20
    monkeypatch.setattr(dry_run, "available_bytes", lambda device: (10 << 20) + size)
    config = transformers.LlamaConfig(
        hidden_size=128, num_hidden_layers=8, num_attention_heads=4, intermediate_size=512,
        vocab_size=1024, dtype="bfloat16",
    )  # fmt: skip
    found = plan(config, device="cpu")
    assert not found.fits
    choice = found.advice[0]
    assert choice.arguments["dtype"] == "bfloat16"
    assert choice.mapped_bytes > size
    assert "mapped)" in str(choice)
    assert dataclasses.replace(found).advice == found.advice


def test_a_cached_name_without_weights(zoo: Any, tmp_path: Path) -> None:
    files = {"config.json": (zoo("gpt2") / "config.json").read_bytes()}
    fill_cache(tmp_path, "org/model", files)
    found = plan("org/model", device="cpu", cache_dir=tmp_path, local_files_only=True)
    assert found.total_bytes == plan(zoo("gpt2"), device="cpu").total_bytes
    assert found.disk_bytes > 0  # a load would download them


def test_what_a_configuration_does_not_say(zoo: Any, bare: Any) -> None:
    folder = bare(zoo("llama-gqa"))
    values = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": method}))
    with pytest.raises(CheckpointError, match="it does not say: they are quantized"):
        plan(folder, device="cpu")
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="holds no weights that can be read"):
        faces.lean_class().from_pretrained_lean(folder, device="cpu")
    for name in ("model.safetensors.index.json", "adapter_model.safetensors", "tf_model.h5"):
        (folder / name).write_text("{}")
        with pytest.raises(CheckpointError):
            plan(folder, device="cpu")
        (folder / name).unlink()
    assert "one of the two" in flat(run("plan", code=2).output)
