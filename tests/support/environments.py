"""What each set of library versions cannot do: the one table by which the tests skip.

The parity suite (`pytest -m parity`) runs unchanged in every environment of the Makefile. A row
says which versions lack something, which cases of the zoo or which tests that concerns, and why.
`SKIPPED` says how many tests are skipped in each environment, which `--count-skips` checks.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from importlib import metadata

from packaging.specifiers import SpecifierSet

PACKAGES = ("torch", "transformer_lens", "transformers", "bitsandbytes")


@dataclass(frozen=True)
class Lack:
    """Something that some versions do not have.

    package, versions: which of them, as a version specifier such as "<3".
    why: the reason that a skipped test gives.
    cases: cases of the zoo that need it.
    tests: beginnings of test names, such as "whole/test_versions.py::test_quantized", that need it.
    files: test files that need it to be imported: of each, one test is left, which is skipped.
    """

    package: str
    versions: str
    why: str
    cases: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def applies(self) -> bool:
        """Whether the installed version is one of them."""
        return installed(self.package) in SpecifierSet(self.versions, prereleases=True)


LACKS: tuple[Lack, ...] = (
    Lack(
        "transformer_lens",
        ">=4",
        "TransformerLens has no HookedTransformer",
        files=(
            "hooked/test_processing.py",
            "quantized/test_packed.py",
            "whole/test_parity.py",
            "whole/test_parity_sources.py",
            "whole/test_quantized_fidelity.py",
            "whole/test_quantized_on_the_fly.py",
            "whole/test_sae_lens.py",
            "whole/test_versions.py",
            "whole/test_versions_features.py",
        ),
    ),
    Lack(
        "transformer_lens",
        "<4.3",
        "an older TransformerLens is tested on one of each kind",
        tests=("bridge/test_bridge_zoo.py::test_every_architecture_is_there",),
    ),
    Lack(
        "transformer_lens",
        "<4",
        "TransformerLens 3 offloads no bridge",
        tests=("bridge/test_bridge_errors.py::test_an_offloaded_bridge",),
    ),
    Lack(
        "transformer_lens",
        "<3",
        "TransformerLens has no TransformerBridge",
        files=(
            "bridge/test_bridge_copies.py",
            "bridge/test_bridge_devices.py",
            "bridge/test_bridge_errors.py",
            "bridge/test_bridge_features.py",
            "bridge/test_bridge_packed.py",
            "bridge/test_bridge_parity.py",
            "bridge/test_bridge_quantized.py",
            "bridge/test_bridge_weights.py",
            "bridge/test_bridge_zoo.py",
            "shards/test_bridge.py",
            "whole/test_sae_bridge.py",
        ),
    ),
    Lack(
        "transformer_lens",
        "<3",
        "TransformerLens has no converter for OLMo",
        ("olmo", "olmo-clip", "olmo2", "olmo3", "olmo3-gqa", "olmoe", "olmoe-gqa"),
    ),
    Lack(
        "transformer_lens",
        "<2.17",
        "TransformerLens has no converter for it",
        ("gemma3", "gemma3-vision", "apertus", "gpt-oss"),
    ),
    Lack(
        "transformer_lens",
        "<2.16",
        "TransformerLens has no converter for Qwen 3",
        ("qwen3", "qwen3-mha"),
    ),
    Lack("transformers", "<4.41", "transformers has no Phi 3", ("phi3", "phi3-gqa")),
    Lack("transformers", "<4.42", "transformers has no Gemma 2", ("gemma2", "gemma2-scale")),
    Lack(
        "transformers",
        "<4.43",
        "transformers reads no llama3 rotary scaling",
        ("llama3-rope", "llama-hub"),
    ),
    Lack(
        "transformers",
        "<4.45",
        "transformers takes hidden_size / num_attention_heads for head_dim",
        ("llama-head-dim", "mistral-nemo"),
    ),
    Lack(
        "torch",
        "<2.1",
        "torch cannot assign parameters",
        tests=(
            "whole/test_versions.py::test_assign_where_torch_can",
            "whole/test_versions.py::test_quantized_while_loading",
            "whole/test_notebooks.py::test_the_quickstart",
            "whole/test_quantized",
            "quantized/",
            "hooked/test_processing.py::test_processing_a_mapped_model",
        ),
    ),
    Lack(
        "torch",
        "<2.1",
        "torch multiplies no float16 matrices on the CPU",
        tests=("whole/test_parity.py::test_experts_have_the_dtype_and_run[mixtral-dtype0]",),
    ),
    Lack(
        "torch",
        ">=2.1",
        "torch can assign parameters",
        tests=(
            "whole/test_versions.py::test_assign_is_refused",
            "whole/test_versions.py::test_quantized_wei",
        ),
    ),
    Lack(
        "transformer_lens",
        ">=3",
        "TransformerLens has it",
        tests=("whole/test_versions.py::test_what_transformer_lens_lacks",),
    ),
    Lack(
        "transformer_lens",
        ">=3",
        "TransformerLens folds the norms in front of experts",
        tests=("whole/test_parity.py::test_norms_in_front_of_experts_keep_their_weights",),
    ),
    Lack(
        "transformer_lens",
        ">=2.17,<3",
        "TransformerLens has Gemma 3",
        tests=("whole/test_versions.py::test_what_transformer_lens_lacks_is_said[gemma3]",),
    ),
    Lack(
        "transformer_lens",
        "<3",
        "stock's process_weights_ fails on a processed model",
        tests=(
            "hooked/test_processing.py::test_an_edited_model_is_processed_again",
            "hooked/test_processing.py::test_steps_that_were_not_done_yet_are",
        ),
    ),
    Lack(
        "transformer_lens",
        "<3",
        "stock's load_and_process_state_dict leaves the norms of the model, which a note says",
        tests=("hooked/test_processing.py::test_a_loaded_state_dict_never_changes",),
    ),
    Lack(
        "transformer_lens",
        "<3",
        "TransformerLens has no attention sinks",
        tests=("whole/test_parity.py::test_value_biases_stay_where_attention_has_sinks",),
    ),
    Lack(
        "transformer_lens",
        "<3",
        "an activation between two 8-bit codes goes the other way and moves it by 0.19, not 0.1",
        tests=(
            "whole/test_quantized_fidelity.py::test_log_probs_of_every_architecture[neox-int8]",
        ),
    ),
    Lack(
        "transformer_lens",
        "<4.3",
        "TransformerLens cannot run it in bfloat16 once it is processed",
        tests=("bridge/test_bridge_parity.py::test_same_bridge[qwen2-moe-bfloat16-from files]",),
    ),
    Lack(
        "sae-lens",
        "<1",
        "not installed",
        tests=("whole/test_sae_lens.py", "whole/test_sae_bridge.py"),
    ),
)

# TransformerLens, torch, SAELens ("0": not installed) -> skipped tests of the parity suite.
SKIPPED: dict[tuple[str, str, str], int] = {
    ("4.3.0", "2.13.0", "0"): 17,
    ("4.0.0", "2.13.0", "0"): 21,
    ("3.9.0", "2.13.0", "0"): 27,
    ("3.9.0", "2.13.0", "6.54.12"): 0,
    ("2.18.0", "2.13.0", "0"): 107,
    ("2.16.1", "2.13.0", "0"): 150,
    ("2.8.1", "2.0.1", "0"): 369,
}


def installed(package: str) -> str:
    """The version of a package, without a local label such as "+cpu"; "0" if it is missing."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "0"


@cache
def lacks() -> list[Lack]:
    """The rows that apply here."""
    return [lack for lack in LACKS if lack.applies()]


def why_not_case(case_id: str) -> str | None:
    """Why a case of the zoo cannot be tested here, or None."""
    return next((_reason(lack) for lack in lacks() if case_id in lack.cases), None)


def why_not_test(name: str) -> str | None:
    """Why a test ("test_file.py::test_name") cannot run here, or None."""
    return next((_reason(lack) for lack in lacks() if name.startswith(lack.tests or "-")), None)


def why_not_file(name: str) -> str | None:
    """Why a test file ("folder/test_file.py") cannot even be imported here, or None."""
    return next((_reason(lack) for lack in lacks() if name in lack.files), None)


def expected_skips() -> int | None:
    """How many tests of the parity suite are skipped with these versions; None: never counted."""
    key = (installed("transformer_lens"), installed("torch"), installed("sae-lens"))
    return SKIPPED.get(key)


def describe() -> str:
    """One line on what is installed."""
    versions = ", ".join(f"{package} {installed(package)}" for package in PACKAGES)
    return f"Python {platform.python_version()}, {versions}"


def _reason(lack: Lack) -> str:
    return f"{lack.package} {lack.versions}: {lack.why}"
