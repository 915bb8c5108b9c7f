"""The command line: what it prints, how it ends, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from tests.support.commands import flat, run
from tl_fastload import LeanHookedTransformer, cli
from tl_fastload.cli import console, diagnosis
from tl_fastload.embedded_model import embedded_model_path
from tl_fastload.quantized import formats

MODEL = str(embedded_model_path())
SHAPE = "llama:d_model=64,n_layers=2,n_heads=4,n_kv_heads=2,d_mlp=176,d_vocab=320,n_ctx=64"
COMMAND = [sys.executable, "-m", "tl_fastload"]


STORES = {stored for format in formats.FORMATS for stored in format.stores}
COMMANDS = ["plan", "load", "bench", "save", "doctor", "cache list", "cache prune", "cache clear"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str) -> None:
    written = flat(run(*name.split(), "--help").output)
    assert "Examples" in written
    assert f"tl-fastload {name}" in written
    assert "--debug" in written


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_means(name: str) -> None:
    found: Any = typer.main.get_command(cli.app)
    for word in name.split():
        found = found.commands[word]
    assert len(found.params) > 1
    for parameter in found.params:
        assert len(parameter.help or "") > 8, parameter.name
        assert parameter.help == " ".join(parameter.help.split())


def test_options_stand_in_groups_and_what_is_off_has_one_name() -> None:
    loads: Any = typer.main.get_command(cli.app)
    options = {one.name: one for one in loads.commands["load"].params}
    groups = {one.rich_help_panel for one in options.values()}
    assert groups == {None, "What to load", "How to load it", "Where it is"}
    assert options["revision"].rich_help_panel == "Where it is"
    assert (options["offline"].opts, options["offline"].secondary_opts) == (["--offline"], [])
    assert options["check_base"].secondary_opts == ["--no-check-base"]
    assert options["n_ctx"].metavar == "N"


def test_the_list_of_commands_tells_the_exit_codes() -> None:
    written = flat(run("--help").output)
    assert "130 Ctrl-C" in written
    for name in ("plan", "load", "bench", "save", "cache", "doctor"):
        assert name in written


def test_version() -> None:
    from tl_fastload import __version__

    assert __version__ in run("--version").output


def test_load_prints_the_report_and_what_comes_next() -> None:
    done = run("load", MODEL, "--device", "cpu", "--prompt", "the hungry", "--top", "3")
    assert done.stdout.startswith("LoadReport")
    assert "peak host memory" in done.stdout
    rows = re.findall(r"│ '(\w+)'\s+│\s+(0\.\d+)\s+│", done.stdout)
    assert len(rows) == 3
    assert [float(p) for _, p in rows] == sorted((float(p) for _, p in rows), reverse=True)


def test_load_as_json_is_nothing_but_json() -> None:
    done = run("load", MODEL, "--prompt", "the hungry", "--json", "-", "--dtype", "bfloat16")
    values = json.loads(done.stdout)
    assert values["report"]["dtype"] == "bfloat16"
    assert len(values["predictions"]) == 5


def test_load_passes_its_options_on() -> None:
    arguments = ["--skip", "fold_ln", "--no-mmap", "--strategy", "copy", "--first-n-layers", "1"]
    values = json.loads(run("load", MODEL, *arguments, "--json", "-").stdout)["report"]
    assert values["strategy"] == "copy"
    assert values["processing"]["fold_ln"].startswith("skipped")
    assert values["processing"]["center_unembed"] == "done"
    values = json.loads(run("load", MODEL, "--no-processing", "--json", "-").stdout)["report"]
    assert set(values["processing"].values()) == {"skipped: not asked for"}


def test_options_become_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def record(model: str, **arguments: Any) -> None:
        given.update(arguments, model_name=model)
        raise KeyboardInterrupt

    monkeypatch.setattr(LeanHookedTransformer, "from_pretrained_lean", record)
    run("load", "gpt2", code=130)
    assert not {"dtype", "layout"} & given.keys()  # a processed copy keeps its own
    assert "adapter" not in given
    assert (given["check_memory"], given["mmap"], given["cache"]) == (True, "auto", None)
    options = (
        "--adapter a --requantize --revision r --subfolder s --offline --n-ctx 8 --layout stock"
    )
    run("load", "gpt2", *options.split(), "--no-check-memory", "--no-cache", code=130)
    wanted = {"adapter": "a", "requantize": True, "revision": "r", "subfolder": "s", "n_ctx": 8}
    wanted |= {"local_files_only": True, "check_memory": False, "cache": False, "layout": "stock"}
    assert wanted.items() <= given.items()


def test_load_draws(tmp_path: Path) -> None:
    run("load", MODEL, "--plot", tmp_path / "a.png", "--map", tmp_path / "b.pdf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.pdf"]


def test_a_prompt_without_a_tokenizer(zoo: Any) -> None:
    done = run("load", zoo("gpt2"), "--prompt", "x", code=1)
    assert "tokenizer" in flat(done.stderr)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["load", "/no/such/folder"], 1, "There is no folder /no/such/folder"),
        (["load", MODEL, "--dtype", "int3"], 2, "--dtype int3"),
        (["load", MODEL, "--quantize", "3bit"], 2, "3bit"),
        (["load", MODEL, "--skip", "nothing"], 2, "'nothing' is none of"),
        (["load"], 2, "Missing argument"),
        (["frobnicate"], 2, "No such command"),
        (["bench"], 2, "one of the two"),
        (["bench", MODEL, "--shape", "gpt2:"], 2, "one of the two"),
        (["bench", MODEL, "--keep", "x"], 2, "--shape only"),
        (["bench", MODEL, "--dtype", "int8"], 2, "none of float32"),
        (["bench", "--shape", "bert:"], 2, "'bert' is none of gpt2, llama"),
        (["bench", "--shape", "gpt2:layers=3"], 2, "layers is none of n_layers"),
        (["bench", "--shape", "gpt2:n_layers=none"], 2, "n_layers=none is not a number"),
        (["bench", "--shape", "llama:d_model=100,n_heads=3"], 2, "multiple of n_heads=3"),
        (["cache", "prune", "--max-size", "many"], 2, "is no size"),
        (["plan", MODEL, "--json", "nowhere/plan.json"], 2, "there is no folder"),
        (["load", MODEL, "--plot", "nowhere/memory.png"], 2, "there is no folder"),
        (["load", MODEL, "--map", "layers.doc"], 2, "layers.doc: pictures are written as"),
        (["bench", MODEL, "--plot", "peaks"], 2, "end the name in one of these"),
    ],
)
def test_errors_are_one_block_without_a_traceback(
    arguments: list[str], code: int, said: str
) -> None:
    done = run(*arguments, code=code)
    assert said in flat(done.stderr)
    assert "Traceback" not in done.output
    assert done.stderr.count("╭") == 1


def test_an_unexpected_error_is_one_block_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(LeanHookedTransformer, "from_pretrained_lean", fail)
    done = run("load", MODEL, code=1)
    assert "ZeroDivisionError" in done.stderr
    assert "--debug" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TL_FASTLOAD_DEBUG", "1")
    done = run("load", "/no/such/folder", "--debug", code=1)
    assert "Traceback" in done.stderr
    assert "There is no folder" in flat(done.stderr)


def test_ctrl_c_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LeanHookedTransformer, "from_pretrained_lean", interrupt)
    assert "Interrupted" in run("load", MODEL, code=130).stderr


def test_save_then_load_then_refuse(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    assert "Saved" in run("save", MODEL, folder, "--dtype", "bfloat16").stdout
    values = json.loads(run("load", folder, "--json", "-").stdout)["report"]
    assert values["dtype"] == "bfloat16"
    assert values["timeline"]["seconds"]
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "config.json").write_text("{}")
    assert "another checkpoint" in flat(run("save", MODEL, taken, code=1).stderr)
    assert [path.name for path in taken.iterdir()] == ["config.json"]


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TL_FASTLOAD_CACHE", str(tmp_path))
    assert "0 copies" in run("cache", "list").stdout
    run("load", MODEL, "--cache")
    listed = json.loads(run("cache", "list", "--json", "-").stdout)
    assert len(listed["entries"]) == 1
    assert listed["size_bytes"] >= listed["entries"][0]["size_bytes"] > 0
    assert "float32" in run("cache", "list").stdout
    assert "Removed 0" in run("cache", "prune", "--max-size", "1G").stdout
    assert CliRunner().invoke(cli.app, ["cache", "clear"], input="n\n").exit_code == 1
    assert "Removed 1" in run("cache", "clear", "--yes").stdout
    assert "0 copies" in run("cache", "list").stdout


def test_plan_tells_without_loading(tmp_path: Path, zoo: Any) -> None:
    done = run("plan", zoo("llama-gqa"), "--device", "cpu", "--plot", tmp_path / "plan.png")
    assert done.stdout.startswith("LoadPlan")
    assert (tmp_path / "plan.png").exists()
    values = json.loads(run("plan", zoo("llama-gqa"), "--json", "-").stdout)
    assert values["fits"] is True


def test_doctor_names_what_it_tried() -> None:
    done = run("doctor")
    for word in ("int8 on cpu", "nf4 on cpu", "transformer_lens", "strategy", "available"):
        assert word in done.stdout
    values = json.loads(run("doctor", "--json", "-").stdout)
    compressed = {f"compressed-tensors-{kind}" for kind in ("fp8", "int8", "packed4", "packed8")}
    read = {"fp8", "mxfp4", "gptq", "awq", "torchao", "gguf", *compressed}
    assert {kernel["kind"] for kernel in values["kernels"]} == {"int8", "nf4", "fp4", *read}
    assert values["caches"][0]["free_bytes"] > 0


def test_doctor_finds_a_broken_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such symbol\nmore")

    for stored in STORES:
        monkeypatch.setattr(stored, "linear", broken)
    found = diagnosis.diagnose()
    assert {kernel.problem for kernel in found.kernels} == {"RuntimeError: no such symbol"}
    assert sum("bitsandbytes does not work" in fix for fix in found.fixes) == 1


def test_doctor_finds_wrong_products(monkeypatch: pytest.MonkeyPatch) -> None:
    for stored in STORES:
        wrong = lambda *a, real=stored.linear: real(*a) * 1.5  # noqa: E731
        monkeypatch.setattr(stored, "linear", wrong)
    assert all("off by" in (kernel.problem or "") for kernel in diagnosis.diagnose().kernels)


def test_doctor_finds_a_network_disk_and_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = diagnosis.metadata.version

    def version(name: str) -> str:
        if name == "matplotlib":
            raise diagnosis.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(diagnosis, "is_on_network", lambda folder: True)
    monkeypatch.setattr(diagnosis, "file_system_kind", lambda folder: "nfs4")
    monkeypatch.setattr(diagnosis.metadata, "version", version)
    found = diagnosis.diagnose()
    fixes = found.fixes
    assert any("network file system (nfs4)" in fix and "HF_HOME" in fix for fix in fixes)
    assert dict(found.rows())["matplotlib"] == "not installed; only for pictures"
    assert not [fix for fix in fixes if "matplotlib" in fix]  # nothing is wrong without


def test_the_bar_shows_bytes_rate_and_time_left() -> None:
    from tl_fastload.report.progress import _new_bar

    shown = {type(column).__name__ for column in _new_bar().columns}
    assert shown >= {"DownloadColumn", "TransferSpeedColumn", "TimeRemainingColumn"}


def test_long_lines_hang_on_a_terminal_and_are_whole_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Long:
        def rows(self) -> list[tuple[str, str]]:
            return [("note", "long words " * 20)]

        def __str__(self) -> str:
            return "whole " * 40

    console.show_rows(Long())
    assert capsys.readouterr().out == "whole " * 40 + "\n"
    terminal = Console(width=40, force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "console", lambda: terminal)
    console.show_rows(Long())
    title, first, *more = capsys.readouterr().out.splitlines()
    assert (title, first[:12]) == ("Long", "  note  long")
    assert len(more) > 3
    assert all(line.startswith(" " * 8 + "long") or line[8:].startswith("words") for line in more)


@pytest.mark.slow
def test_no_bar_when_nobody_watches(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "load", MODEL], capture_output=True, text=True, check=True, timeout=900
    )
    assert done.stdout.startswith("LoadReport")
    assert "\x1b" not in done.stdout + done.stderr
    assert "MiB/s" not in done.stderr


@pytest.mark.slow
def test_bench_measures_lean_and_stock(tmp_path: Path) -> None:
    written = [tmp_path / "found.json", tmp_path / "peaks.png", tmp_path / "peaks-timeline.png"]
    done = run(
        *("bench", "--shape", SHAPE, "--repeats", "1", "--dtype", "float32", "--quantize", "8bit"),
        *("--json", written[0], "--plot", written[1], "--keep", tmp_path / "model"),
    )
    assert "vs stock" in done.stdout
    values = json.loads(written[0].read_text())
    names = [one["name"] for one in values["measurements"]]
    assert names == ["stock float32", "lean float32", "lean 8bit"]
    for one in values["measurements"]:
        assert one["error"] is None
        assert one["peak_anonymous_bytes"] > 0
        assert one["timeline"]["seconds"]
    assert [phase["name"] for phase in values["measurements"][1]["timeline"]["phases"]] == [
        "configuration",
        "recording",
        "placing",
    ]
    assert str(Path.home()) not in written[0].read_text()
    assert all(path.stat().st_size > 1000 for path in written)
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_bench_of_a_folder_that_stock_cannot_name() -> None:
    done = run("bench", MODEL, "--repeats", "1", "--json", "-")
    stock, lean = json.loads(done.stdout)["measurements"]
    assert stock["error"] is None
    assert stock["facts"]["parameter_bytes"] == lean["facts"]["parameter_bytes"]


ENDED = """
import tempfile
from tl_fastload.cli.console import end_on_sigterm
end_on_sigterm()
with tempfile.TemporaryDirectory() as folder:
    print(folder, flush=True)
    input()
"""


def test_a_terminated_program_removes_its_folders() -> None:
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", ENDED], text=True, **pipes) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir()
        process.terminate()
        _, written = process.communicate(timeout=300)
    assert (process.returncode, written) == (143, "")
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"]
)
def test_a_signal_leaves_nothing_behind(number: int, code: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "bench", "--shape", SHAPE, "--repeats", "50"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while "[2/" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.5)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    assert list(tmp_path.glob("tl_fastload-*"))
    process.send_signal(number)
    _, written = process.communicate(timeout=900)
    assert process.returncode == code
    assert "Nothing is left behind" in written
    assert "Traceback" not in written
    assert list(tmp_path.glob("tl_fastload-*")) == []
    assert not any(child.is_running() for child in children)
