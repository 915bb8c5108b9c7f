"""`device_map=`: parts of a model on several devices, or at home and copied where they run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import commands
from tests.support.comparison import differences, lean_model, run, values
from tests.support.reference import NO_PROCESSING
from tl_fastload import ArgumentError, load_weights_, plan, save_lean
from tl_fastload.placement.spread import CPU, Parts, Spread
from tl_fastload.placement.streaming import put_to_work

EVERYWHERE = {"": "cpu"}
CASES = ("gpt2", "llama-gqa", "mixtral", "bloom")


def streamed(model: Any) -> Any:
    """A model whose parts run on another device than they lie on, which has the same memory."""
    parts = Parts.of(model).places
    where = Spread(dict.fromkeys(parts, CPU), dict.fromkeys(parts, torch.device("cpu", 0)))
    put_to_work(model, where)
    return model


@pytest.mark.parametrize("case_id", CASES)
@pytest.mark.parametrize("quantize", [None, "8bit"])
def test_streamed_parts_compute_the_same(case_id: str, quantize: Any, zoo: Any) -> None:
    plain = lean_model(zoo(case_id), quantize=quantize)
    model = streamed(lean_model(zoo(case_id), device_map=EVERYWHERE, quantize=quantize))
    logits, cache = run(model, case_id)
    wanted, wanted_cache = run(plain, case_id)
    assert torch.equal(logits, wanted)
    for name, activation in wanted_cache.items():
        assert torch.equal(cache[name], activation), name
    prompt = torch.arange(1, 6)[None]
    settings = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    assert torch.equal(model.generate(prompt, **settings), plain.generate(prompt, **settings))
    assert torch.equal(model.W_U, plain.W_U)
    assert torch.equal(model.W_Q, plain.W_Q)


def test_streamed_models_are_worked_on_as_others(zoo: Any, tmp_path: Path) -> None:
    """Their values are at home, so that what reads or writes them finds them."""
    folder = zoo("gpt2")
    plain = lean_model(folder, **NO_PROCESSING)
    model = streamed(lean_model(folder, device_map=EVERYWHERE, **NO_PROCESSING))
    for one in (plain, model):
        one.process_weights_()
    assert differences(plain, model) == []
    save_lean(model, tmp_path / "copy")
    mapped = lean_model(tmp_path / "copy", device_map={"": "disk"})
    assert differences(plain, mapped) == []
    assert mapped.load_report.mapped_bytes > 0.9 * mapped.load_report.parameter_bytes
    other = lean_model(zoo("gpt2"))
    load_weights_(model, other.state_dict())
    assert differences(other, model.to_layout_("stock")) == []
    assert all(p.is_contiguous() for p in model.parameters())
    assert torch.equal(run(model, "gpt2")[0], run(other, "gpt2")[0])


def test_state_dicts_are_processed_into_streamed_models(zoo: Any) -> None:
    plain, model = (lean_model(zoo("gpt2"), device_map=EVERYWHERE, **NO_PROCESSING) for _ in "ab")
    given = {name: value.clone() for name, value in plain.state_dict().items()}
    for one in (plain, streamed(model)):
        one.load_and_process_state_dict(dict(given))
        assert one.cfg.normalization_type == "LNPre"
    assert differences(plain, model) == []
    assert torch.equal(run(model, "gpt2")[0], run(plain, "gpt2")[0])


def test_unprocessed_weights_stay_mapped(zoo: Any) -> None:
    arguments = {**NO_PROCESSING, "device_map": {"": "disk", "embed": "cpu"}}
    model = lean_model(zoo("llama-gqa"), **arguments)
    assert model.load_report.mapped_bytes > 0.9 * model.load_report.parameter_bytes
    assert values(model).keys() == values(lean_model(zoo("llama-gqa"), **NO_PROCESSING)).keys()
    (note,) = [note for note in model.load_report.notes if note.startswith("Device map")]
    assert note == "Device map: cpu: embed; disk: blocks.0-2, ln_final, unembed."
    assert note in plan(zoo("llama-gqa"), **arguments).notes


def test_processed_weights_are_not_on_disk(big_llama: Path, no_reading: None) -> None:
    for load in (lean_model, plan):
        with pytest.raises(ArgumentError, match=r'"disk".*processed copy.*save_lean'):
            load(big_llama, device_map={"": "cpu", "blocks.1": "disk"})


@pytest.fixture(scope="module")
def big_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 MB in float32: parameters are large enough to count."""
    return save_llama(tmp_path_factory.mktemp("big"), d_model=512, n_layers=3, n_heads=4)


def save_llama(folder: Path, *, d_model: int, n_layers: int, n_heads: int) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        vocab_size=64,
        max_position_embeddings=32,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_device_that_is_left_idle() -> None:
    from types import SimpleNamespace

    from tl_fastload.hooked.empty import device_map

    cfg = SimpleNamespace(device="cuda:0", n_devices=3, n_layers=2)
    with pytest.warns(UserWarning, match=r"n_devices=3 leaves 1 idle: 2 layers lie on cuda:0"):
        device_map(SimpleNamespace(cfg=cfg), True)


def test_the_command_line(zoo: Any) -> None:
    folder = zoo("llama-gqa")
    commands.run("plan", folder, "--device-map", "auto", "--max-memory", "cpu=1GiB")
    found = commands.run("plan", folder, "--device-map", '{"": "cpu"}')
    assert "Device map: cpu" in commands.flat(found.output)
    for option in (("--device-map", "{"), ("--max-memory", "much")):
        assert option[0] in commands.flat(commands.run("plan", folder, *option, code=2).output)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("quantize", [None, "8bit", "nf4"])
def test_on_a_gpu(quantize: Any, big_llama: Path) -> None:
    """Blocks on the host are streamed; what is streamed is freed."""
    tokens = torch.arange(16)[None] % 64
    whole = lean_model(big_llama, device="cuda", quantize=quantize)
    wanted, wanted_cache = whole.run_with_cache(tokens)
    count = torch.cuda.device_count()
    homes = {"": 0, "blocks.1": "cpu", "blocks.2": count - 1}
    model = lean_model(big_llama, device_map=homes, quantize=quantize)
    assert {p.device.type for p in model.blocks[1].parameters()} == {"cpu"}
    for _ in range(3):
        logits, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(logits.cpu(), wanted.cpu(), rtol=1e-4, atol=1e-4)
    for name, activation in wanted_cache.items():
        torch.testing.assert_close(cache[name].cpu(), activation.cpu(), rtol=1e-4, atol=1e-4)
    assert {p.device.type for p in model.blocks[1].parameters()} == {"cpu"}
    prompt = torch.arange(1, 6)[None]
    settings = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    answers = [one.generate(prompt, **settings).cpu() for one in (model, whole)]
    assert torch.equal(*answers)


_HALF = """
    import sys
    import torch
    from tl_fastload import LeanHookedTransformer

    arguments = {"progress": False, "check_memory": False, "device_map": {"": "disk"}}
    model = LeanHookedTransformer.from_pretrained_lean(sys.argv[1], **arguments)
    with open(sys.argv[2], "w") as file:
        file.write("0")  # from now on the group takes this process
    seen = []
    hooks = [("blocks.0.hook_resid_post", lambda x, hook: seen.append(x.sum().item()))]
    tokens = torch.arange(8)[None]
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    _, cache = model.run_with_cache(tokens)
    print(logits.double().sum().item(), seen[0], cache["blocks.3.hook_resid_post"].sum().item())
"""


@contextlib.contextmanager
def _group(limit_bytes: int) -> Iterator[Path]:
    """A control group that holds no more memory than that, file pages included."""
    name = f"tl_fastload_{os.getpid()}"
    for root, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        group = Path("/sys/fs/cgroup", root, name)
        if not (group.parent / "cgroup.procs").exists():
            continue
        try:
            group.mkdir()
            (group / limit).write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"no control group of our own: {error}")
        try:
            yield group
        finally:
            group.rmdir()
        return
    pytest.skip("this system has no control groups")


@pytest.mark.slow
def test_twice_the_memory_that_there_is(tmp_path: Path) -> None:
    """A processed copy runs in half of its size: its pages come and go."""
    folder = save_llama(tmp_path / "model", d_model=1024, n_layers=6, n_heads=8)
    copy = save_lean(lean_model(folder), tmp_path / "copy")
    size = sum(path.stat().st_size for path in copy.iterdir())
    answers = []
    with _group(size // 2) as group:
        for procs in (os.devnull, str(group / "cgroup.procs")):
            for path in copy.iterdir():  # no page is there that another group has paid for
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            command = [sys.executable, "-c", textwrap.dedent(_HALF), str(copy), procs]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            answers.append(done.stdout.splitlines()[-1])
        failures = group / "memory.failcnt"
        if failures.exists():
            assert int(failures.read_text()) > 0, "the limit was never met"
    assert answers[0] == answers[1]
