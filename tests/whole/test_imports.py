"""What importing does, and what it does not: no heavy libraries, no patches, no old surprise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_hub import SINGLE, fill_cache
from tests.support.forks import asked_afresh

HEAVY = (
    "matplotlib",
    "peft",
    "lightning",
    "pytorch_lightning",
    "IPython",
    "sklearn",
    "typer",
)


MODULES = """
before = set(sys.modules)
import tl_fastload.lightning
from tl_fastload import *
print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
"""


def test_importing_adds_nothing_heavy(answers: dict[str, str]) -> None:
    before, added = json.loads(answers["modules"])
    for name in (*HEAVY, "bitsandbytes", "accelerate"):
        assert not [module for module in added if module.split(".")[0] == name]
    ours = [module for module in added if module.startswith("tl_fastload")]
    assert "tl_fastload.model" in ours
    # Every library that is new is a small one that we declare.
    roots = {module.split(".")[0] for module in added} - {"tl_fastload"}
    third_party = {root for root in roots if root not in sys.stdlib_module_names}
    assert not any(root.startswith("_") for root in third_party - {"_cython_0_29_37"})
    assert third_party <= {"packaging", "psutil", "rich", "einops", "safetensors", "pygments"}
    assert before


QUICK = """
import json, sys
import tl_fastload
from tl_fastload import cli
from typer.testing import CliRunner
codes = [CliRunner().invoke(cli.app, words.split()).exit_code for words in sys.argv[1:]]
print(json.dumps([codes, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def test_the_command_line_answers_without_the_libraries() -> None:
    """They take seconds, and neither the help nor a misspelt option needs them."""
    commands = ("plan", "load", "bench", "save", "cache list", "cache prune", "doctor")
    right = ["--help", "--version", *(f"{name} --help" for name in commands)]
    wrong = [
        "frobnicate",
        "load",
        "load x --colour red",
        "load x --skip no",
        "bench --dtype int8 x",
    ]
    command = [sys.executable, "-c", QUICK, *right, *wrong]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
    codes, loaded = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0] * len(right) + [2] * len(wrong)
    slow = {"torch", "transformers", "transformer_lens", "numpy", "huggingface_hub", "matplotlib"}
    assert slow.isdisjoint(loaded)


def test_names_are_there_when_they_are_asked_for() -> None:
    import tl_fastload

    named = tl_fastload.__getattr__("cache")  # imported by now: as if it were not
    assert named is sys.modules["tl_fastload.cache"]
    assert tl_fastload.__getattr__("plan") is sys.modules["tl_fastload.faces"].plan
    assert {"plan", "cache", "__version__"} <= set(dir(tl_fastload))
    assert not hasattr(tl_fastload, "no_such_thing")
    assert not hasattr(tl_fastload, "_hidden")


SNAPSHOT = """
import importlib
NAMES = ["torch", "torch.nn", "torch.nn.modules.module", "torch.nn.init", "torch.nn.functional",
    "torch.serialization", "torch._tensor", "torch.utils._pytree", "einops", "transformers",
    "transformers.modeling_utils", "transformers.configuration_utils", "safetensors.torch",
    "transformers.models.auto.auto_factory", "transformers.core_model_loading", "huggingface_hub",
    "transformer_lens", "transformer_lens.HookedTransformer", "transformer_lens.config",
    "transformer_lens.loading_from_pretrained", "transformer_lens.weight_processing",
    "transformer_lens.utilities", "transformer_lens.components"]
def snapshot():
    found = {}
    for name in NAMES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        for key, value in list(vars(module).items()):
            if callable(value):
                found[name, key] = value
            if isinstance(value, type):
                for attribute, function in list(vars(value).items()):
                    if callable(function) or isinstance(function, (classmethod, staticmethod)):
                        found[name, key, attribute] = function
    return found
import transformer_lens, torch, logging
import transformers
transformers.AutoConfig, transformers.LlamaForCausalLM
before = snapshot()
state = torch.get_default_dtype(), torch.is_grad_enabled(), logging.getLogger("transformers").level
import tl_fastload
models = []
for case, flags in zip(sys.argv[1:], ({}, {"strategy": "copy"})):
    models.append(tl_fastload.LeanHookedTransformer.from_pretrained_lean(case, device="cpu",
        progress=False, dtype="bfloat16", **flags))
    models[-1].process_weights_()
try:
    lean = tl_fastload.LeanHookedTransformer.from_pretrained_lean
    lean(sys.argv[1], first_n_layers=99, device="cpu")
except Exception:
    pass
after = snapshot()
now = torch.get_default_dtype(), torch.is_grad_enabled(), logging.getLogger("transformers").level
changed = [".".join(key) for key in before if after.get(key) is not before[key]]
print(json.dumps([len(before), changed, state == now]))
"""


def test_nothing_is_patched(answers: dict[str, str]) -> None:
    count, changed, same_state = json.loads(answers["patched"])
    assert count > 2000
    assert changed == []
    assert same_state


VERSION_4 = """
from importlib import metadata
real = metadata.version
ours = ("transformer_lens", "transformer-lens")
metadata.version = lambda name: "4.0.0" if name in ours else real(name)
import tl_fastload
try:
    tl_fastload.LeanHookedTransformer
except ImportError as error:
    print(type(error).__name__, error)
"""


def test_a_transformer_lens_without_hooked_transformer(answers: dict[str, str]) -> None:
    said = answers["version 4"]
    assert said.startswith("MissingPackageError")
    assert "LeanTransformerBridge" in said
    assert "4.0.0" in said
    assert "transformer-lens>=2.8,<4" in said
    assert said.count(". ") <= 2  # one sentence, the other class, and the command


HUB_HOME = """
from tl_fastload.hooked.official_names import resolve_model
from tl_fastload.source.checkpoint import open_weights
checkpoint = open_weights(resolve_model("gpt2-small"))
try:
    resolve_model("distilgpt2")
except Exception as error:
    entries, kind = sorted(checkpoint.entries), type(error).__name__
    print(json.dumps([entries, checkpoint.label, kind, str(error)]))
"""


def test_the_environment_variable_of_the_hub(answers: dict[str, str]) -> None:
    """huggingface_hub reads it at import, so a fresh process is the only honest test of it."""
    entries, label, kind, said = json.loads(answers["hub"])
    assert (entries, label, kind) == (["a", "b"], "gpt2@main", "UnknownModelError")
    assert said.startswith("Cannot find the model 'distilgpt2'.")
    assert "HF_HUB_OFFLINE is set" in said


@pytest.fixture(scope="module")
def answers(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What code says in processes that have imported TransformerLens, and nothing of ours."""
    home = tmp_path_factory.mktemp("hub-home")
    fill_cache(home / "hub", "gpt2", SINGLE)
    first = "import json, sys, transformer_lens"
    questions: dict[str, tuple[str, tuple[Path, ...]]] = {
        "modules": (MODULES, ()),
        "patched": (SNAPSHOT, (zoo("llama-gqa"), zoo("solu"))),
        "version 4": (VERSION_4, ()),
        "hub": (HUB_HOME, ()),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            patch.delenv(name, raising=False)
        where = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
        told = asked_afresh(first, [*questions.values()], tmp_path_factory.mktemp("told"), **where)
    return dict(zip(questions, told, strict=True))


@pytest.mark.parametrize("version", ["4.0.0", "4.0.dev0", "4.0.0rc1", "5.1"])
def test_versions_that_lack_it(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from packaging.version import Version

    from tl_fastload.ground import compat

    monkeypatch.setattr(compat, "TRANSFORMER_LENS", Version(version))
    with pytest.raises(ImportError, match="HookedTransformer"):
        compat.require_hooked_transformer()


@pytest.mark.parametrize("version", ["2.8.1", "2.18.0", "3.9.0"])
def test_versions_that_have_it(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from packaging.version import Version

    from tl_fastload.ground import compat

    monkeypatch.setattr(compat, "TRANSFORMER_LENS", Version(version))
    assert compat.require_hooked_transformer() is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("version", "can"), [("2.0.1", False), ("2.1.0+cpu", True), ("2.1.0a0", True), ("2.13", True)]
)
def test_torch_versions_that_assign(
    version: str, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from packaging.version import Version

    from tl_fastload.ground import compat

    monkeypatch.setattr(compat, "TORCH", Version(version))
    assert compat.can_assign() is can


def test_the_package_is_typed_and_names_what_it_has() -> None:
    import tl_fastload

    assert (Path(tl_fastload.__file__).parent / "py.typed").exists()
    assert all(hasattr(tl_fastload, name) for name in tl_fastload.__all__)
    assert sorted(tl_fastload.__all__) == tl_fastload.__all__


def test_one_version_everywhere() -> None:
    import tl_fastload

    root, version = Path(__file__).parents[2], tl_fastload.__version__
    assert f'\nversion = "{version}"\n' in (root / "pyproject.toml").read_text()
    assert f"\nversion: {version}\n" in (root / "CITATION.cff").read_text()
