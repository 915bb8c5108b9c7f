"""How the source is laid out: one direction of imports, small files and functions, one home for
each library.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tl_fastload"


def module_name(path: Path) -> str:
    """The dotted name of a file of the package, without `tl_fastload`; a package's is its own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FOLDERS = ("tl_fastload", "benchmarks", "demo", "notebooks", "tests")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
ROOMS = (
    *("printable", "errors", "ground", "report", "recipes", "source", "quantized", "request"),
    *("huggingface", "placement", "roads", "shards", "hooked", "bridge", "copies", "loading"),
    "planning",
    *("cache", "face", "model", "bridge_model", "faces"),
    *("lightning", "embedded_model", "memory_map", "plots", "quantization", "timeline"),
    *("cli", "__main__"),
)
"""In the order of the data: a room imports only rooms before it."""

ROADS = ("hooked", "bridge")
"""Each knows TransformerLens, and none what is done with what it records."""

MOST_LINES_OF_A_FILE = 450
MOST_LINES_OF_A_FUNCTION = 60

HOMES = {
    "bitsandbytes": {"quantized.formats.bitsandbytes_kernels"},
    "lightning": {"lightning"},
    "matplotlib": {"report.pictures.canvas"},
    "peft": {name for name in MODULES if name.startswith("huggingface.lora.")},
    "pytorch_lightning": {"lightning"},
}


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    """Full names of what a file imports anywhere in it: in functions and for type checking too."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """The modules of the package that a file imports; what is none comes from `__init__`."""
    found = set()
    for name in imported(path):
        package, _, module = name.partition(".")
        if package == "tl_fastload":
            while module and module not in MODULES:  # a name in a module
                module = module.rpartition(".")[0]
            found.add(module or "__init__")
    return found


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next and the last the first; empty without."""
    done: set[str] = set()

    def search(module: str, road: list[str]) -> list[str]:
        if module in road:
            return [*road[road.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            found = search(other, [*road, module])
            if found:
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := search(module, []))), [])


def test_imports_go_one_way() -> None:
    graph = {name: own_imports(path) for name, path in MODULES.items()}
    assert cycle_in(graph) == []
    assert graph["__main__"] == {"cli"}  # the names are found at all
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def room_of(module: str) -> str:
    return module.partition(".")[0]


def against(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports of each module that lie in a later room than its own."""
    places = {room: place for place, room in enumerate(ROOMS)}
    later = {
        name: {other for other in found if places[room_of(other)] > places[room_of(name)]}
        for name, found in graph.items()
    }
    return {name: found for name, found in later.items() if found}


def test_a_room_imports_only_rooms_before_it() -> None:
    graph = {name: own_imports(path) - {"__init__"} for name, path in MODULES.items()}
    del graph["__init__"]
    assert {room_of(name) for name in graph} == set(ROOMS)
    assert against(graph) == {}
    assert against({"source.hub": {"errors", "hooked.stock"}}) == {"source.hub": {"hooked.stock"}}


def asks_for_transformer_lens(path: Path) -> bool:
    """Whether a file imports TransformerLens, by a statement or by a name."""
    by_name = (
        text.value
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
        for text in ast.walk(node)
        if isinstance(text, ast.Constant) and isinstance(text.value, str)
    )
    return any(
        found.partition(".")[0] == "transformer_lens" for found in (*imported(path), *by_name)
    )


def test_transformer_lens_is_known_on_its_roads_only() -> None:
    found = {name for name, path in MODULES.items() if asks_for_transformer_lens(path)}
    assert {"hooked.stock", "hooked.devices", "cli.bench.loads"} <= found
    assert {n for n in found if room_of(n) not in ROADS} == {"cli.bench.loads"}


def test_what_loads_plans_and_keeps_copies_knows_no_road() -> None:
    for name, path in MODULES.items():
        if room_of(name) in ("copies", "loading", "planning"):
            assert {n for n in own_imports(path) if room_of(n) in ROADS} == set(), name
        if room_of(name) in ROADS:
            others = {*ROADS, "copies", "loading", "planning"} - {room_of(name)}
            assert {n for n in own_imports(path) if room_of(n) in others} == set(), name


@pytest.mark.parametrize("library", HOMES)
def test_one_home_for_each_library(library: str) -> None:
    homes = {
        name
        for name, path in MODULES.items()
        if any(found.partition(".")[0] == library for found in imported(path))
    }
    assert homes <= HOMES[library]


# Spelt in a text that names something: TransformerLens' names for parameters and their parts.
NAME_OF_A_PARAMETER = re.compile(
    r"\b_?[Wb]_(Q|K|V|O|E|U|in|out|gate|pos)\b|\bln(1|2|_f|_final)\b|\bblocks(\\?\.|$)"
    r"|\b(pos_|un)embed\.|\bembed\.|\.[wb]$|\brotary_(sin|cos)\b|\bIGNORE\b"
)
# Puts tables of its own into attention layers, which have to be called as they are there.
MAKES_PARAMETERS = {"hooked.rope_tables"}


def named_parameters(path: Path) -> Iterator[str]:
    """Where code spells a parameter's name: in a text without spaces, or as an attribute."""
    told = {id(n.value) for n in ast.walk(syntax(path)) if isinstance(n, ast.Expr)}
    for node in ast.walk(syntax(path)):
        text = getattr(node, "attr", "") if isinstance(node, ast.Attribute) else ""
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            text = node.value if " " not in node.value else ""
        if NAME_OF_A_PARAMETER.search(text):
            yield f"{path.name}:{node.lineno} {text}"


def test_one_place_knows_the_names_of_parameters() -> None:
    found = {name: set(named_parameters(path)) for name, path in MODULES.items()}
    known = {name for name, spelt in found.items() if spelt}
    assert "hooked.names" in known  # they are found at all
    assert {
        name: found[name] for name in known - {f"{road}.names" for road in ROADS} - MAKES_PARAMETERS
    } == {}


def asked_of_torch(path: Path) -> Iterator[str]:
    """Where a file asks what the installed torch has, or compares versions."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            subject = ast.unparse(node.args[0]) if node.args else ""
            name = node.args[1] if len(node.args) > 1 else None
            is_asked = node.func.id in ("hasattr", "getattr") and isinstance(name, ast.Constant)
            if is_asked and subject.partition(".")[0] == "torch":
                yield f"{path.name}:{node.lineno} {ast.unparse(node)}"
    yield from (f"{path.name}: {name}" for name in imported(path) if name.startswith("packaging"))


def test_what_a_torch_lacks_is_met_in_one_place() -> None:
    found = {name: list(asked_of_torch(path)) for name, path in MODULES.items()}
    assert found.pop("ground.compat") != []
    assert {name: asked for name, asked in found.items() if asked} == {}


def test_files_are_short() -> None:
    # Not the tests: a long list of cases is still one thing to read.
    files = [path for path in SOURCES if ROOT / "tests" not in path.parents]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {p.name: n for p, n in lengths.items() if n > MOST_LINES_OF_A_FILE} == {}


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement to the last, the docstring left out."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_are_short() -> None:
    long = {
        f"{path.name}:{node.lineno} {node.name}": lines_of(node)
        for path in SOURCES
        for node in ast.walk(syntax(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and lines_of(node) > MOST_LINES_OF_A_FUNCTION
    }
    assert long == {}


def test_the_design_page_names_each_room_and_in_it_each_module() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = page.partition("| room | its job | must not know | modules |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    named = {row[0].strip("`"): re.findall(r"`([\w.]+)`", row[3]) for row in rows}
    assert tuple(named) == ROOMS
    for room, modules in named.items():
        inside = [name.removeprefix(f"{room}.") for name in MODULES if name.startswith(f"{room}.")]
        assert sorted(modules) == sorted(inside), room
    assert all(job and not_known for _, job, not_known, _ in rows)


def test_temporary_files_go_with_pytests_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    code = "import tempfile; print(tempfile.gettempdir())"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for folder in (tempfile.gettempdir(), made.stdout.strip()):
        assert tmp_path_factory.getbasetemp() in Path(folder).parents


def test_programs_with_temporary_files_are_unwound_by_sigterm() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    wanted = {
        path.name
        for path, text in texts.items()
        if "TemporaryDirectory(" in text and '__name__ == "__main__"' in text
    }
    found = {path.name for path, text in texts.items() if "end_on_sigterm()" in text}
    assert {"fuzzing.py", "execute.py"} <= wanted - {Path(__file__).name} <= found


def test_no_path_of_a_developers_machine() -> None:
    # Written in two parts, so that this file does not hold them.
    patterns = [f"/{name}/" for name in ("work", "root")] + ["/tmp/" + "w/"]
    arguments = [part for pattern in patterns for part in ("-e", pattern)]
    command = ["git", "grep", "-InF", *arguments]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode > 1:
        pytest.skip("not a git checkout")
    assert found.stdout == ""
