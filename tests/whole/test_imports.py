"""What importing does, and what it does not: no heavy libraries, no patches, no old surprise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HEAVY = (
    "matplotlib",
    "peft",
    "lightning",
    "pytorch_lightning",
    "IPython",
    "sklearn",
    "typer",
)


def run(code: str, *arguments: Any) -> str:
    """Run code in a fresh process; its last line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


MODULES = """
import json, sys
import transformer_lens
before = set(sys.modules)
import tl_fastload.lightning
from tl_fastload import *
print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
"""


def test_importing_adds_nothing_heavy() -> None:
    before, added = json.loads(run(MODULES))
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
    codes, loaded = json.loads(run(QUICK, *right, *wrong))
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
import importlib, json, os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
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


def test_nothing_is_patched(zoo: Any) -> None:
    count, changed, same_state = json.loads(run(SNAPSHOT, zoo("llama-gqa"), zoo("solu")))
    assert count > 2000
    assert changed == []
    assert same_state


def test_a_transformer_lens_without_hooked_transformer() -> None:
    code = """
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
    said = run(code)
    assert said.startswith("MissingPackageError")
    assert "LeanTransformerBridge" in said
    assert "4.0.0" in said
    assert "transformer-lens>=2.8,<4" in said
    assert said.count(". ") <= 2  # one sentence, the other class, and the command


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
