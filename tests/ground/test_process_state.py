"""The state of the process and of its other threads: a load neither changes nor follows it."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import shutil
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

import tl_fastload
from tests.support import adapters, quantized_zoo, reference
from tests.support.comparison import lean_model
from tl_fastload import NotEnoughMemory
from tl_fastload.embedded_model import embedded_model_path
from tl_fastload.ground import compat
from tl_fastload.ground.own_defaults import Defaults, own_defaults
from tl_fastload.loading import load as sessions
from tl_fastload.placement.placer import Placer
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.quantized.formats.bitsandbytes_kernels import full_code
from tl_fastload.recipes.evaluate import evaluate
from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise
from tl_fastload.report import memory

Road = Callable[[], Any]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RAW = dict.fromkeys(
    ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
)


@pytest.fixture(scope="module")
def roads(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Road]:
    """Every kind of call that loads, plans or saves."""
    root = tmp_path_factory.mktemp("roads")
    llama, wide = zoo("llama-gqa1-tied"), quantized_zoo.build(zoo, "llama-gqa")
    nf4 = quantized_zoo.saved(wide, "nf4-double")
    adapter = adapters.for_case("llama-gqa1-tied", llama, root / "adapter")
    hf_model = reference.hf_model("llama-gqa1-tied", llama)
    live = lean_model(llama, **RAW, mmap=False)
    values = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    kept = lean_model(llama, **RAW, mmap=False)
    kept.save_lean(root / "copy")

    def load_into(change: Callable[[Any], Any], model: Any = live) -> Any:
        model.load_state_dict(values)
        change(model)
        return model

    return {
        "processed": partial(lean_model, embedded_model_path()),
        "unprocessed": partial(lean_model, embedded_model_path(), **RAW),
        "refactored": partial(
            lean_model, embedded_model_path(), refactor_factored_attn_matrices=True
        ),
        "copied": partial(lean_model, llama, strategy="copy", dtype="bfloat16"),
        "composite": partial(lean_model, _naming_dtypes(zoo("gemma3-vision"), root / "composite")),
        "torch file": partial(lean_model, zoo("gpt2", bin=True)),
        "quantized now": partial(lean_model, wide, quantize="nf4"),
        "quantized": partial(lean_model, nf4),
        "adapter": partial(lean_model, llama, adapter=adapter),
        "hf_model": partial(lean_model, llama, hf_model=hf_model),
        "processed copy": partial(lean_model, root / "copy", **RAW),
        "load_weights_": lambda: load_into(lambda m: tl_fastload.load_weights_(m, llama), kept),
        "process_weights_": lambda: load_into(lambda m: m.process_weights_(fold_ln=False)),
        "state dict": lambda: load_into(
            lambda m: m.load_and_process_state_dict(values, fold_ln=False)
        ),
        "saved": lambda: lean_model(kept.save_lean(root / "again"), **RAW),
        "plan": lambda: tl_fastload.plan(llama, device="cpu", quantize="8bit"),
    }


def _naming_dtypes(folder: Path, target: Path) -> Path:
    """A copy whose sub-configurations name a dtype, as transformers writes them on every save."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    for part in (config["text_config"], config["vision_config"]):
        part[compat.CONFIG_DTYPE_NAME] = "float32"
    (target / "config.json").write_text(json.dumps(config))
    return target


def numbers(made: Any) -> dict[str, Any]:
    """What a road gave, to compare."""
    if not isinstance(made, nn.Module):
        return {"plan": torch.tensor([made.total_bytes, made.peak_anonymous_bytes])}
    found = {}
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        parts = tensor.content.tensors() if isinstance(tensor, QuantizedTensor) else {"": tensor}
        for part, value in parts.items():
            assert not value.is_inference()
            found[f"{name}.{part}", tensor.requires_grad] = value.detach().clone()
    return found


def unequal(found: dict[str, Any], wanted: dict[str, Any]) -> list[Any]:
    return [
        name
        for name in wanted.keys() | found.keys()
        if name not in wanted
        or name not in found
        or (found[name].dtype, found[name].device) != (wanted[name].dtype, wanted[name].device)
        or not torch.equal(found[name], wanted[name])
    ]


@pytest.fixture(scope="module")
def alone(roads: dict[str, Road]) -> dict[str, dict[str, Any]]:
    """What each road gives while the caller has set nothing."""
    return {name: numbers(road()) for name, road in roads.items()}


def state() -> dict[str, Any]:
    """What belongs to the whole process."""
    loggers = ["", "transformers", "transformers.generation", "bitsandbytes", "peft"]
    found = [logging.getLogger(name) for name in loggers]
    return {
        "default dtype": torch.get_default_dtype(),
        "made": (torch.zeros(1).dtype, torch.zeros(1).device, torch.tensor(1.5).dtype),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "logging": [(one.level, one.disabled, list(one.filters)) for one in found],
        "disabled": logging.root.manager.disable,
        "random": (random.getstate(), torch.get_rng_state().tolist()),
        "threads": torch.get_num_threads(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "place": (Path.cwd(), dict(os.environ)),
        "torch files": getattr(torch.serialization, "get_safe_globals", list)(),
    }


def test_eight_threads_load_what_each_loads_alone() -> None:
    def load(dtype: torch.dtype) -> dict[str, Any]:
        return numbers(lean_model(embedded_model_path(), dtype=dtype))

    wanted = {dtype: load(dtype) for dtype in DTYPES}
    before, seen, done = state(), [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            now = state()
            seen.extend(name for name in now if now[name] != before[name])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(load, DTYPES * 2))
    finally:
        done.set()
        watcher.join()
    assert [unequal(one, wanted[d]) for one, d in zip(found, DTYPES * 2, strict=True)] == [[]] * 8
    assert seen == []
    assert state() == before


def test_nothing_of_the_process_is_changed_for_a_moment(
    roads: dict[str, Road], alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = []

    def watched(owner: Any, name: str, by_anyone: bool = True) -> None:
        real = getattr(owner, name)

        def record(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if by_anyone or caller.startswith("tl_fastload"):
                changed.append((name, caller))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, record)

    for name in ("set_default_dtype", "set_default_device", "manual_seed", "set_num_threads"):
        watched(torch, name)
    for name in ("setLevel", "addFilter", "removeFilter"):
        watched(logging.Logger, name)
    for name in ("simplefilter", "filterwarnings", "catch_warnings"):
        watched(warnings, name, by_anyone=False)  # torch and NumPy have their own
    watched(os, "chdir")
    if hasattr(torch.serialization, "safe_globals"):
        watched(torch.serialization, "safe_globals")
        watched(torch.serialization, "add_safe_globals")
    before = state()
    for road in roads.values():
        road()
    assert changed == []
    assert state() == before


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


# Several at once, each made anew for every load: whichever is followed shows.
SETTINGS = {
    "defaults": [
        partial(default_dtype, torch.bfloat16),
        partial(default_device, "meta"),
        partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    ],
    "modes": [
        partial(default_dtype, torch.float64),
        partial(torch.device, "meta"),
        torch.inference_mode,
    ],
    "accelerate": [init_empty_weights, torch.no_grad],
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_the_caller_has_set_changes_no_number(
    setting: str, roads: dict[str, Road], alone: dict[str, Any]
) -> None:
    modes = torch._C._len_torch_function_stack()
    for name, road in roads.items():
        with ExitStack() as stack:
            for enter in SETTINGS[setting]:
                stack.enter_context(enter())
            inside = torch._C._len_torch_function_stack()
            made = road()
            assert torch._C._len_torch_function_stack() == inside
        assert unequal(numbers(made), alone[name]) == [], name
    assert torch._C._len_torch_function_stack() == modes


def test_a_model_quantized_under_another_default_dtype_loads(
    zoo: Any, tmp_path: Path, alone: dict[str, Any]
) -> None:
    folder = quantized_zoo.build(zoo, "llama-gqa")
    with default_dtype(torch.bfloat16):  # in which bitsandbytes makes the table of the 16 values
        hf_model = quantized_zoo.hf_model(folder, "nf4-double")
    hf_model.save_pretrained(tmp_path)
    assert unequal(numbers(lean_model(tmp_path)), alone["quantized"]) == []
    given = lean_model(folder, hf_model=hf_model)
    assert unequal(numbers(given), alone["quantized"]) == []
    other = torch.arange(16.0).bfloat16()
    assert full_code(other, "nf4") is other  # not the type's own: refused as before


def test_defaults_are_given_to_what_names_none() -> None:
    with default_dtype(torch.float64), torch.device("meta"), own_defaults():
        halves = torch.tensor([1, 2]) / 2
        assert [
            x.dtype for x in (torch.ones(2), torch.tensor([1, 2.5]), torch.full((1,), 1.0))
        ] == [torch.float32] * 3
        assert (halves.dtype, (2.0 ** torch.arange(3)).dtype) == (torch.float32, torch.float32)
        assert torch.sqrt(torch.arange(3)).dtype == torch.float32
        # What says what it wants, or has a dtype of its own, gets that.
        assert torch.ones(2, dtype=torch.float16).dtype == torch.float16
        assert torch.as_tensor(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
        assert [torch.tensor([1, 2]).dtype, torch.arange(3).dtype] == [torch.int64] * 2
        assert torch.full((2,), True).dtype == torch.bool
        assert torch.arange(3).to(torch.float16).dtype == torch.float16
        assert {x.device.type for x in (halves, torch.arange(2), torch.zeros(1))} == {"cpu"}
        with torch.device("meta"), Defaults(torch.bfloat16):
            assert torch.empty(1).dtype == torch.bfloat16
        with Defaults(torch.bfloat16), torch.device("meta"):
            assert (torch.empty(1).dtype, torch.empty(1).is_meta) == (torch.bfloat16, True)


def test_a_plan_says_nothing(
    roads: dict[str, Road], caplog: Any, capsys: Any, recwarn: pytest.WarningsRecorder
) -> None:
    fewer = {"first_n_layers": 1, "center_unembed": True}
    tl_fastload.plan(embedded_model_path(), device="cpu", dtype="float16", **fewer)
    assert (caplog.records, capsys.readouterr().out) == ([], "")
    assert [str(one.message) for one in recwarn if "HookedTransformer" in str(one.message)] == []


def test_cuda_is_left_alone_by_a_load_onto_the_cpu(
    roads: dict[str, Road], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for name in (
        *("is_available", "device_count", "mem_get_info", "reset_peak_memory_stats", "synchronize"),
        *("memory_allocated", "max_memory_allocated", "memory_reserved", "current_device"),
        *("init", "_lazy_init", "empty_cache"),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name, **kw: asked.append(name))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in ("processed", "copied", "processed copy", "load_weights_", "state dict", "plan"):
        roads[name]()
    assert asked == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_loads_onto_the_cpu() -> None:
    child = os.fork()
    if child == 0:
        torch.cuda._is_in_bad_fork = lambda: True  # as after a parent that has used CUDA
        torch.cuda.is_available = lambda: 1 / 0
        code = 1
        try:
            torch.set_num_threads(1)
            code = 0 if lean_model(embedded_model_path()).load_report.peak_host_bytes >= 0 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_cuda_statistics_are_read_and_not_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = {0: 100, 1: 700}
    highest = {0: 900, 1: 700}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", highest.__getitem__)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *args: 1 / 0)
    monkeypatch.setattr(memory, "SAMPLE_SECONDS", 60)
    with memory.PeakSampler() as below:
        below.watch([torch.device("cpu"), torch.device("cuda:0")])
        allocated[0] = 400
        below.look()
        allocated[0] = 200
    assert below.peak_device_bytes == 300  # the process had more before: what was seen
    with memory.PeakSampler() as above:
        above.watch([torch.device("cuda:1")])
        highest[1] = 1900
    assert above.peak_device_bytes == 1200  # above all that was before: exact
    assert above.timeline().device_bytes[-1] == 0
    with memory.PeakSampler() as none:
        none.watch([torch.device("cpu")])
    assert (none.peak_device_bytes, none.timeline().device_bytes) == (None, ())


def test_a_failed_load_lets_go_of_what_it_placed(
    roads: dict[str, Road], monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[Any] = []
    failures: list[BaseException] = []
    put = Placer._put

    def put_and_fail(self: Any, name: str, tensor: torch.Tensor) -> None:
        put(self, name, tensor)
        parent, _, leaf = name.rpartition(".")
        placed.append(weakref.ref(self.model.get_submodule(parent)._parameters[leaf]))
        if len(placed) % 5 == 0:
            raise failures[-1]

    monkeypatch.setattr(Placer, "_put", put_and_fail)
    torch_error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nMore")
    host_error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    for failure, expected in (
        (torch_error, NotEnoughMemory),
        (host_error, NotEnoughMemory),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        placed.clear()
        failures.append(failure)
        with pytest.raises(expected) as caught:
            roads["processed"]()
        gc.collect()
        assert [one for one in placed if one() is not None and not one().is_meta] == []
        if expected is NotEnoughMemory:
            assert "Nothing was loaded" in str(caught.value)


def test_room_is_counted_with_the_buffers_that_move(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(4))
    model.register_buffer("table", torch.zeros(1000), persistent=False)
    facts = {
        "model": model,
        "device_of": lambda self, name: torch.device("meta"),
        "streaming_bytes": lambda self, quantized: quantized,
    }
    placer: Any = type("P", (), facts)
    peaks = {"peak_bytes": {torch.device("meta"): 16}, "held_bytes": {"weight": 16}}
    found = type("F", (), {**peaks, "quantized_bytes": {}})
    monkeypatch.setattr(sessions, "forecast", lambda placer, recipes: found)
    needed = sessions._needed_bytes(placer(), {}, None)
    assert needed == {torch.device("meta"): 4016}


def test_products_follow_no_precision_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(40, 8), torch.randn(8, 30)
    promises = [Promise.of(MemorySource(x)) for x in (a, b)]
    plain = evaluate((promises[0] @ promises[1]).node, torch.device("cpu")).tensor
    assert torch.equal(plain, a @ b)
    monkeypatch.setattr(compat, "multiplies_in_fewer_bits", lambda: True)
    wide = evaluate((promises[0] @ promises[1]).node, torch.device("cpu")).tensor
    assert torch.equal(wide, (a.double() @ b.double()).float())
    before = torch.get_float32_matmul_precision()
    monkeypatch.undo()
    try:
        assert not compat.multiplies_in_fewer_bits()
        torch.set_float32_matmul_precision("medium")
        assert compat.multiplies_in_fewer_bits()
    finally:
        torch.set_float32_matmul_precision(before)
