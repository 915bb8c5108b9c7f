"""The loaders of a TransformerBridge that are compared. Runs inside the measured process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import Case
from tl_fastload.cli.bench.loads import blank_tokenizer, import_architecture, torch_dtype

Load = Callable[[], Any]


def _arguments(case: Case, folder: Path) -> dict[str, Any]:
    import_architecture(folder)
    blank_tokenizer()  # its imports
    return {"dtype": torch_dtype(case.dtype), "device": "cpu"}


def _stock(case: Case, folder: Path) -> Load:
    from transformer_lens.model_bridge import TransformerBridge

    arguments = _arguments(case, folder)

    def load() -> Any:
        boot = TransformerBridge.boot_transformers
        bridge = boot(str(folder), tokenizer=blank_tokenizer(), **arguments)
        if case.processed:
            bridge.enable_compatibility_mode(disable_warnings=True)
        return bridge

    return load


def _lean(case: Case, folder: Path) -> Load:
    from tl_fastload import LeanTransformerBridge

    arguments = _arguments(case, folder)
    load = (
        LeanTransformerBridge.from_pretrained_lean
        if case.processed
        else LeanTransformerBridge.boot_transformers_lean
    )
    return lambda: load(folder, tokenizer=blank_tokenizer(), **arguments)


def _in_place(case: Case, folder: Path) -> Load:
    """A bridge that TransformerLens booted, processed lean."""
    from tl_fastload import LeanTransformerBridge

    boot = _stock(Case(case.model, case.road, case.dtype, processed=False), folder)

    def load() -> Any:
        bridge = LeanTransformerBridge.of(boot())
        bridge.enable_compatibility_mode(disable_warnings=True)
        return bridge

    return load


ROADS: dict[str, Callable[[Case, Path], Load]] = {
    "bridge-in-place": _in_place,
    "bridge-lean": _lean,
    "bridge-stock": _stock,
}
