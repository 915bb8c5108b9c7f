"""The command line speaks of its options, ends with codes that mean something, and starts where
other libraries are broken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import flat, run
from tl_fastload.cli import options
from tl_fastload.embedded_model import embedded_model_path
from tl_fastload.ground import compat

MODEL = embedded_model_path()


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("dtype='bfloat16', quantize='nf4' (x)", "--dtype bfloat16 --quantize nf4 (x)"),
        ("dtype=torch.float16 and", "--dtype float16 and"),
        ("fit:\n  n_ctx=12\ncheck_memory=False", "fit:\n  --n-ctx 12\n--no-check-memory"),
        (
            "fold_ln=False, center_writing_weights=False, center_unembed=False, "
            "fold_value_biases=False, dtype='bfloat16'",
            "--no-processing --dtype bfloat16",
        ),
        ("fold_ln=False, mmap=True", "--skip fold_ln --mmap"),
        ('use strategy="auto", which copies', "use --strategy auto, which copies"),
        ("local_files_only=True", "--offline"),
        ("hf_model= and tokenizer=None", "hf_model= and tokenizer=None"),
        ("--shape: dtype=int3 is none", "--shape: dtype=int3 is none"),
        ("source  llama:n_ctx=8,dtype=float16", "source  llama:n_ctx=8,dtype=float16"),
        ("/models/dtype=float16/n_ctx=8", "/models/dtype=float16/n_ctx=8"),
        (
            "with from_pretrained_no_processing_lean (then process_weights_() processes it), or",
            "with --no-processing, or",
        ),
        ("with LeanTransformerBridge.boot_transformers_lean.", "with --no-processing."),
        ("Take tl_fastload.LeanTransformerBridge, or", "Take --road bridge, or"),
    ],
)
def test_options_in_place_of_arguments(said: str, written: str) -> None:
    assert options.as_options(said) == written


@pytest.mark.parametrize("words", ["--dtype int8", "--strategy quick", "--layout odd", "--n-ctx 0"])
def test_a_value_that_an_option_cannot_have_is_not_understood(words: str) -> None:
    option = words.split()[0]
    for command in ("plan", "load"):
        said = flat(run(command, MODEL, *words.split(), code=2).output)
        assert option in said
        assert f"{option[2:].replace('-', '_')}=" not in said


def test_what_failed_is_another_code(tmp_path: Path) -> None:
    for command in (["plan", tmp_path / "none"], ["load", tmp_path / "none"]):
        assert "There is no folder" in flat(run(*command, code=1).output)


def test_the_help_names_every_kind_and_what_is_replaced() -> None:
    for command in ("plan", "load", "save", "bench"):
        said = flat(run(command, "--help").output)
        assert all(kind in said for kind in options.QUANTIZATIONS), command
    assert "which is replaced" in flat(run("save", "--help").output)


def test_one_spelling_of_dtypes() -> None:
    arguments = ("--dtype", "bfloat16", "--json", "-")
    assert json.loads(run("plan", MODEL, *arguments).stdout)["dtype"] == "bfloat16"
    assert json.loads(run("load", MODEL, *arguments).stdout)["report"]["dtype"] == "bfloat16"


BROKEN = """
import json, sys
from typer.testing import CliRunner
from tl_fastload import cli
found = []
for words in sys.argv[1:]:
    done = CliRunner().invoke(cli.app, words.split())
    found.append([done.exit_code, " ".join(done.output.split())])
print(json.dumps(found))
"""


def test_a_broken_bitsandbytes(tmp_path: Path) -> None:
    """TransformerLens 3 imports it wherever it is there, and fails with it."""
    (tmp_path / "bitsandbytes").mkdir()
    text = "raise RuntimeError('CUDA Setup failed despite GPU being available.\\nMore.')\n"
    (tmp_path / "bitsandbytes" / "__init__.py").write_text(text)
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH"), *sys.path]))
    commands = ["--help", "doctor", f"plan {MODEL}"]
    done: Any = subprocess.run(
        [sys.executable, "-c", BROKEN, *commands],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    (helped, _), (doctored, facts), (planned, said) = json.loads(done.stdout.splitlines()[-1])
    assert (helped, doctored) == (0, 0)
    assert "int8 on cpu does NOT work" in facts
    if compat.TRANSFORMER_LENS.major == 3:
        assert planned == 1
        for text in (facts, said.replace(" │ │ ", " ")):
            assert "cannot be imported: bitsandbytes fails (RuntimeError: CUDA Setup" in text
            assert "pip uninstall bitsandbytes" in text
