"""SAELens' SAETransformerBridge as the class that is loaded lean, on TransformerLens 3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import bridge_stock, bridge_zoo
from tests.support.bridge_comparison import differences, snapshot, without_values
from tests.support.bridge_stock import quiet
from tests.support.sae import small_sae
from tl_fastload import LeanBridgeMixin

pytestmark = pytest.mark.parity

BridgeZoo = Callable[..., Path]
FEW = ("gpt2", "llama-gqa", "neox", "gemma2")


@pytest.fixture(scope="module")
def lean_class() -> Any:
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    class LeanSAEBridge(LeanBridgeMixin, SAETransformerBridge):
        """The class of the documentation."""

    return LeanSAEBridge


def stock_bridge(folder: Path) -> Any:
    """SAELens' own: booted by stock, then processed."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    with quiet():
        bridge = SAETransformerBridge.boot_transformers(str(folder), device="cpu")
    return bridge_stock.process(bridge)


def lean_bridge(lean_class: Any, folder: Path, **arguments: Any) -> Any:
    with quiet():
        return lean_class.from_pretrained_lean(folder, device="cpu", progress=False, **arguments)


@pytest.mark.parametrize("case_id", FEW)
def test_same_numbers_with_an_sae(
    case_id: str, bridge_zoo_folder: BridgeZoo, lean_class: Any
) -> None:
    folder = bridge_zoo_folder(case_id)
    stock, lean = stock_bridge(folder), lean_bridge(lean_class, folder)
    apart = differences(snapshot(stock, case_id), snapshot(lean, case_id))
    assert apart == []
    sae, (tokens, _) = small_sae(lean.cfg.d_model), bridge_zoo.inputs(case_id)
    with torch.no_grad(), quiet():
        plain, wanted = stock(tokens), stock.run_with_saes(tokens, saes=[sae])
        _, wanted_cache = stock.run_with_cache_with_saes(tokens, saes=[sae])
        found = lean.run_with_saes(tokens, saes=[sae])
        _, cache = lean.run_with_cache_with_saes(tokens, saes=[sae])
    assert torch.equal(found, wanted)
    assert (wanted - plain).abs().max() > 0.1  # the SAE is really in the way
    assert list(cache) == list(wanted_cache)
    acts = lean.get_sae_hook_name(sae)
    assert torch.equal(cache[acts], wanted_cache[acts])
    assert cache[acts].count_nonzero() > 0


@pytest.mark.parametrize("load", ["from files", "booted lean", "booted by SAELens"])
def test_an_sae_stays_attached(load: str, bridge_zoo_folder: BridgeZoo, lean_class: Any) -> None:
    """However it is loaded; with the error term it changes nothing, and nothing is left of it."""
    folder = bridge_zoo_folder("gpt2")
    if load == "from files":
        lean = lean_bridge(lean_class, folder)
    else:
        from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

        with quiet():
            if load == "booted lean":
                boot = lean_class.boot_transformers_lean
                lean = boot(folder, device="cpu", progress=False)
            else:
                theirs = SAETransformerBridge.boot_transformers(str(folder), device="cpu")
                lean = lean_class.of(theirs)
        bridge_stock.process(lean)
    assert without_values(lean) == []
    tokens = bridge_zoo.inputs("gpt2")[0]
    with torch.no_grad(), quiet():
        plain = lean(tokens)
        lean.add_sae(small_sae(lean.cfg.d_model), use_error_term=True)
        torch.testing.assert_close(lean(tokens), plain, rtol=1e-4, atol=1e-4)
        assert lean.acts_to_saes
        lean.reset_saes()
        assert torch.equal(lean(tokens), plain)


def test_it_loads_lean(bridge_zoo_folder: BridgeZoo, lean_class: Any) -> None:
    lean = lean_bridge(lean_class, bridge_zoo_folder("llama-gqa", dtype=torch.bfloat16))
    assert type(lean) is lean_class
    assert lean.load_report.strategy == "assign"
