"""Every block of code in the README and the docs runs, and so does every example of `--help`."""

from __future__ import annotations

import contextlib
import inspect
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tl_fastload
from tests.support.pushable_hub import PushableHub, pushable_hub
from tl_fastload import cli
from tl_fastload.cli.bench import run
from tl_fastload.cli.bench.loads import Contender
from tl_fastload.cli.bench.process import Measurement
from tl_fastload.embedded_model import embedded_model_path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_EXAMPLE = re.compile(r"^ +(tl-fastload .+)$", re.MULTILINE)
# Models of the hub, and of the reader: the embedded one stands in for them.
_STANDS_FOR = ("gpt2", "gpt2-xl", "./my-model")
# Methods of torch and TransformerLens that are overridden, and what makes a report.
_INNER = ("fill_missing_keys", "load_state_dict", "measured", "of")
# Of HookedTransformer alone: subclasses of it, memory orders, names of its weights, raw copies.
_OF_HOOKED = ("README.md:3", "README.md:4", "troubleshooting.md:0", "weights.md:0", "weights.md:2")
_OF_HOOKED += ("processed_copies.md:1",)
_SCREEN_LINES, _SCREEN_COLUMNS = 50, 160


def _blocks(language: str) -> list[Any]:
    return [
        pytest.param(code, id=f"{page.name}:{number}")
        for page in PAGES
        for number, (found, code) in enumerate(_BLOCK.findall(page.read_text(encoding="utf-8")))
        if found == language
    ]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PushableHub]:
    with pushable_hub(monkeypatch, tmp_path) as found:
        yield found


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("code", _blocks("python"))
def test_a_block_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = code.replace('from_pretrained_lean("gpt2")', f'from_pretrained_lean("{_embedded()}")')
    exec(compile(code, "docs", "exec"), {"__name__": "docs"})


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    "code",
    [
        block
        for block in _blocks("python")
        if "LeanHookedTransformer" in block.values[0] and block.id not in _OF_HOOKED
    ],
)
def test_a_block_runs_with_a_bridge_in_its_place(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = code.replace("LeanHookedTransformer", "LeanTransformerBridge")
    test_a_block_runs(code, tmp_path, monkeypatch)


@pytest.fixture
def command_line(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder and a cache of its own, and benchmarks that take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TL_FASTLOAD_CACHE", str(tmp_path / "cache"))
    subject = run.Subject("model", "model", "model", tmp_path, (), 0, {})
    monkeypatch.setattr(run, "subject_of", lambda *_: contextlib.nullcontext(subject))
    monkeypatch.setattr(run, "run", _measured)
    return tmp_path


def _measured(_: Any, contenders: Sequence[Contender], *__: Any) -> dict[Contender, Measurement]:
    facts = {"parameter_bytes": 1 << 20}
    return {one: Measurement(one.name, (1.0,), 1 << 20, 1 << 20, facts=facts) for one in contenders}


def _run(line: str) -> None:
    """A line of a console: a command of ours, or a target of the Makefile."""
    program, *words = shlex.split(line, comments=True)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE), line
        return
    assert program == "tl-fastload", line
    words = [_embedded() if word in _STANDS_FOR else word for word in words]
    done = CliRunner().invoke(cli.app, words, input="y\n")
    assert done.exit_code == 0, (line, done.output)


def _embedded() -> str:
    return str(embedded_model_path())


@pytest.mark.parametrize("code", _blocks("console"))
def test_a_console_block_runs(code: str, command_line: Path) -> None:
    for line in code.splitlines():
        _run(line)


def _help_texts() -> list[Any]:
    found = []
    for group, app in (("", cli.app), ("cache ", cli.cache_app)):
        texts = {one.name or "": one.callback for one in app.registered_commands}
        if app.registered_callback is not None:
            texts[""] = app.registered_callback.callback
        found += [pytest.param(inspect.getdoc(f), id=f"{group}{name}") for name, f in texts.items()]
    return found


@pytest.mark.parametrize("text", _help_texts())
def test_the_examples_of_a_help_text_run(text: str, command_line: Path) -> None:
    examples = _EXAMPLE.findall(text)
    assert examples
    for line in examples:
        _run(line)


def _public() -> list[Any]:
    """What `tl_fastload` names: functions, and the methods that classes of ours define."""
    found = []
    for name in tl_fastload.__all__:
        value = getattr(tl_fastload, name)
        members = vars(value).items() if inspect.isclass(value) else {name: value}.items()
        for member, function in members:
            function = getattr(function, "__func__", function)
            if inspect.isfunction(function) and not (member.startswith("_") or member in _INNER):
                found.append(pytest.param(function, id=f"{name}.{member}"))
    return found


@pytest.mark.parametrize("function", _public())
def test_the_public_api_is_documented(function: Any) -> None:
    text = inspect.getdoc(function) or ""
    assert text
    if re.search(r"as for `|`\w+` (with|under)|see `", text):
        return  # the arguments are those of the function that the text names
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("self", "cls"):
            continue
        star = {parameter.VAR_POSITIONAL: r"\*", parameter.VAR_KEYWORD: r"\*\*"}
        assert re.search(rf"^ +{star.get(parameter.kind, '')}{name}: \S", text, re.MULTILINE), name


def test_no_block_is_left_out() -> None:
    languages = {
        page.name: {language for language, _ in _BLOCK.findall(page.read_text(encoding="utf-8"))}
        for page in PAGES
    }
    # The one text is a drawing.
    assert {page for page, found in languages.items() if "text" in found} == {"design.md"}
    assert set().union(*languages.values()) == {"python", "console", "text"}
    fences = sum(page.read_text(encoding="utf-8").count("\n```") for page in PAGES)
    every = [block for kind in ("python", "console", "text") for block in _blocks(kind)]
    assert fences == 2 * len(every)


def test_what_pip_is_told_to_install_can_be_had() -> None:
    """Our own package from a clone with extras that it has, or what it depends on."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = {
        re.split(r"[><=\[ ]", line)[0] for line in re.findall(r'^    ?"(.+?)"', project, re.M)
    }
    wanted.add("kernels")  # of bitsandbytes
    wanted |= set(re.findall(r'^\w+ = \["([\w-]+)>', project, re.M))  # the extras
    pages = [*PAGES, *(ROOT / "tl_fastload").rglob("*.py")]
    told = [
        (page.name, word)
        for page in pages
        for rest in re.findall(r"pip install ([^\n`';)]+)", page.read_text(encoding="utf-8"))
        for word in shlex.split(rest.partition(" (")[0].rstrip(". "))
        if not word.startswith(("-", "{"))
    ]
    assert {"README.md", "style.py", "adapter.py"} <= {page for page, _ in told}
    for page, word in told:
        extra = re.fullmatch(r"\.\[(\w+)\]", word)
        known = word in (".", "") or re.split("[><={]", word)[0] in wanted
        assert known or (extra and re.search(f"^{extra[1]} = ", project, re.M)), (page, word)


def test_the_readme_takes_two_screens_before_its_reference_part() -> None:
    before, _, _ = README.partition("\n## Reference\n")
    lines = sum(1 + len(line) // _SCREEN_COLUMNS for line in before.splitlines())
    assert lines <= 2 * _SCREEN_LINES
    for part in ("make demo", "| stock ", "## Versions", "## Limits", "quantize=", "plan("):
        assert part in before


def test_the_site_has_every_guide() -> None:
    listed = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    guides = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert guides <= listed, "add it to the nav of mkdocs.yml"
