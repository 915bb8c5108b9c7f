"""SAELens' HookedSAETransformer as the class that is loaded lean."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import reference
from tests.support.comparison import changed, lean_model, values
from tests.support.sae import HOOK, small_sae
from tests.support.zoo import CASES, tokens
from tl_fastload import LeanLoadingMixin

pytestmark = pytest.mark.parity

PROCESSING: dict[str, dict[str, bool]] = {"processed": {}, "unprocessed": reference.NO_PROCESSING}


@pytest.fixture(scope="module")
def lean_class() -> type:
    from sae_lens import HookedSAETransformer

    class LeanSAETransformer(LeanLoadingMixin, HookedSAETransformer):
        """The class of the README."""

    return LeanSAETransformer


def pair(case_id: str, folder: Any, lean_class: type, **flags: Any) -> tuple[Any, Any]:
    """The model from SAELens' own class, with stock's weights, and from the lean one."""
    from sae_lens import HookedSAETransformer

    weights = reference.stock_model(case_id, folder, device="cpu", **flags)
    stock = HookedSAETransformer(weights.cfg)
    stock.load_state_dict(weights.state_dict())
    lean = lean_class.from_pretrained_lean(folder, device="cpu", progress=False, **flags)
    return stock.eval(), lean.eval()


@pytest.mark.parametrize("processing", PROCESSING)
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "neox", "gemma2"])
def test_same_numbers_with_an_sae(
    case_id: str, processing: str, zoo: Any, lean_class: type
) -> None:
    stock, lean = pair(case_id, zoo(case_id), lean_class, **PROCESSING[processing])
    assert changed(values(stock), lean) == []
    sae, ids = small_sae(lean.cfg.d_model), tokens(case_id)
    with torch.no_grad():
        plain, wanted = stock(ids), stock.run_with_saes(ids, saes=[sae])
        _, wanted_cache = stock.run_with_cache_with_saes(ids, saes=[sae])
        found = lean.run_with_saes(ids, saes=[sae])
        _, cache = lean.run_with_cache_with_saes(ids, saes=[sae])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - plain).abs().max() > 0.1  # the SAE is really in the way
    assert list(cache) == list(wanted_cache)
    acts = f"{HOOK}.hook_sae_acts_post"
    torch.testing.assert_close(cache[acts], wanted_cache[acts], rtol=1e-5, atol=1e-5)
    assert cache[acts].count_nonzero() > 0


def test_an_sae_stays_attached_with_its_error_term(zoo: Any, lean_class: type) -> None:
    """With the error term, the SAE changes nothing; without the SAE, nothing is left of it."""
    lean = lean_class.from_pretrained_lean(zoo("gpt2"), device="cpu", progress=False)
    ids = tokens("gpt2")
    with torch.no_grad():
        plain = lean(ids)
        lean.add_sae(small_sae(lean.cfg.d_model), use_error_term=True)
        torch.testing.assert_close(lean(ids), plain, rtol=1e-4, atol=1e-4)
        lean.reset_saes()
        assert torch.equal(lean(ids), plain)


def test_it_loads_lean(zoo: Any, lean_class: type) -> None:
    """Also under the names that SAELens' users call."""
    folder = zoo("llama-gqa", dtype=torch.bfloat16)
    lean = lean_class.from_pretrained_no_processing(
        folder, dtype="bfloat16", device="cpu", progress=False
    )
    assert lean.load_report.strategy == "assign"
    assert lean.load_report.mapped_bytes > 0
    plain = lean_model(folder, dtype=torch.bfloat16, **reference.NO_PROCESSING)
    assert changed(values(plain), lean) == []
    assert lean.cfg.d_vocab == CASES["llama-gqa"].d_vocab
