"""Where adapters are found, and what merging costs: the hub's cache, mapped weights, one product a
matrix.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import adapters, reference
from tests.support.comparison import lean_model
from tests.support.fake_hub import COMMIT, OTHER_COMMIT, fill_cache, forbid_network
from tl_fastload import CheckpointError
from tl_fastload.recipes.promise import Promise


def _files(folder: Path, prefix: str = "") -> dict[str, bytes]:
    names = ("adapter_config.json", "adapter_model.safetensors")
    return {prefix + name: (folder / name).read_bytes() for name in names}


def test_from_the_hubs_cache(zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_network(monkeypatch)
    base, cache = zoo("llama-gqa"), tmp_path / "cache"
    one = adapters.for_case("llama-gqa", base, tmp_path / "one", seed=1)
    two = adapters.for_case("llama-gqa", base, tmp_path / "two", seed=2)
    fill_cache(cache, "org/adapter", {**_files(one), **_files(two, "last/")})
    fill_cache(cache, "org/adapter", _files(two), commit=OTHER_COMMIT, refs=("v2",))
    wanted = {"org/adapter": one, "org/adapter/last": two, "org/adapter@v2": two}
    for name, folder in wanted.items():
        lean = adapters.lean(base, name, cache_dir=cache)
        assert not adapters.gaps(lean, adapters.lean(base, folder))
        assert lean.load_report.adapters[0].startswith(name)
    lean = adapters.lean(base, f"org/adapter@{COMMIT}", cache_dir=cache, local_files_only=True)
    assert not adapters.gaps(lean, adapters.lean(base, one))
    with pytest.raises(CheckpointError, match="adapter 'org/adapter/first'"):
        adapters.lean(base, "org/adapter/first", cache_dir=cache)


class _Counted(TorchDispatchMode):
    """Counts operations on real tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(isinstance(a, Promise) or getattr(a, "is_meta", False) for a in args):
            self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def _counts(folder: Path, **arguments: Any) -> Counter[Any]:
    with _Counted() as counted:
        lean_model(folder, **arguments)
    return counted.calls


@pytest.mark.parametrize("case_id", ["gpt2", "neox"])
def test_one_product_a_matrix_even_if_it_is_fused(zoo: Any, tmp_path: Path, case_id: str) -> None:
    base, product = zoo(case_id), torch.ops.aten.mm.default
    adapter = adapters.for_case(case_id, base, tmp_path / "adapter")
    for flags, most in ((reference.NO_PROCESSING, 4), ({}, 5)):  # b_O reads W_V and W_O
        added = _counts(base, adapter=adapter, **flags) - _counts(base, **flags)
        n_layers = 2
        assert added[product] <= most * n_layers


def test_the_sum_and_the_lengths_are_taken_in_place(zoo: Any, tmp_path: Path) -> None:
    base, aten = zoo("llama-gqa"), torch.ops.aten
    adapter = adapters.for_case("llama-gqa", base, tmp_path / "adapter", use_dora=True)
    added = _counts(base, adapter=adapter, **reference.NO_PROCESSING)
    added -= _counts(base, **reference.NO_PROCESSING)
    matrices = 7 * lean_model(base).cfg.n_layers
    assert added[aten.add_.Tensor] == matrices
    assert added[aten.mul_.Tensor] == 2 * matrices
    assert not added[aten.add.Tensor]
    assert not added[aten.mul.Tensor]


def test_what_the_adapter_leaves_alone_is_still_mapped(zoo: Any, tmp_path: Path) -> None:
    base = zoo("llama-gqa")
    adapter = adapters.for_case(
        "llama-gqa", base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["norm"]
    )
    plain = lean_model(base, **reference.NO_PROCESSING)
    lean = adapters.lean(base, adapter, **reference.NO_PROCESSING)
    touched = sum(b.attn.W_Q.nbytes for b in plain.blocks)
    assert lean.load_report.mapped_bytes == plain.load_report.mapped_bytes - touched
