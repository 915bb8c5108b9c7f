"""Every architecture, dtype and combination of flags: the bridge is stock's, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import bridge_stock
from tests.support.bridge_comparison import Snapshot, differences, snapshot, without_values
from tests.support.bridge_stock import NO_PROCESSING, STEPS, quiet
from tests.support.bridge_zoo import (
    CASES,
    NO_FORWARD_IN_BFLOAT16,
    RAW_ONLY,
    STUMBLES,
    WRONG_WHEN_PROCESSED,
)
from tl_fastload import LeanTransformerBridge
from tl_fastload.errors import LeanLoadError, NumbersWarning

pytestmark = pytest.mark.parity

BridgeZoo = Callable[..., Path]
Flags = dict[str, bool]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROCESSED = [name for name in CASES if name not in {*RAW_ONLY, *WRONG_WHEN_PROCESSED}]

# Fused and separate heads, parallel blocks, grouped heads, offsets of norms and norms after the
# sublayer, ALiBi, experts in one tensor, and fused gates.
EVERY_FLAG = [
    case_id
    for case_id in ("gpt2", "neox", "llama-gqa", "gemma2", "bloom", "mixtral", "phi3", "falcon")
    if case_id in CASES
]


@dataclass
class Stock:
    """Stock's bridge of a case, looked at before and after compatibility mode."""

    case_id: str
    dtype: torch.dtype
    folder: Path
    _bridge: Any = field(init=False)

    def __post_init__(self) -> None:
        self._bridge = bridge_stock.boot(self.folder, self.dtype)

    @property
    def forward(self) -> bool:
        return self.dtype == torch.float32 or self.case_id not in NO_FORWARD_IN_BFLOAT16

    def look(self, bridge: Any) -> Snapshot:
        return snapshot(bridge, self.case_id, forward=self.forward)

    @cached_property
    def raw(self) -> Snapshot:
        return self.look(self._bridge)

    @cached_property
    def processed(self) -> Snapshot:
        assert self.raw  # looked at first
        return self.look(bridge_stock.process(self._bridge))


_LAST: dict[str, Stock] = {}


@pytest.fixture
def stock(case_id: str, dtype: str, bridge_zoo_folder: BridgeZoo) -> Stock:
    """One boot of stock's for all the tests of a case, which follow each other."""
    key = f"{case_id} {dtype}"
    if key not in _LAST:
        _LAST.clear()
        _LAST[key] = Stock(case_id, DTYPES[dtype], bridge_zoo_folder(case_id))
    return _LAST[key]


def lean(folder: Path, dtype: torch.dtype, **arguments: Any) -> Any:
    """Booted and processed."""
    with quiet():
        return LeanTransformerBridge.from_pretrained_lean(
            folder, dtype=dtype, device="cpu", progress=False, **arguments
        )


def lean_raw(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    with quiet():
        return LeanTransformerBridge.boot_transformers_lean(
            folder, dtype=dtype, device="cpu", progress=False
        )


def booted_by_stock(folder: Path, dtype: torch.dtype) -> Any:
    return LeanTransformerBridge.of(bridge_stock.boot(folder, dtype))


ROADS: dict[str, Callable[[Path, torch.dtype], Any]] = {
    "from files": lean,
    "booted lean": lambda *source: bridge_stock.process(lean_raw(*source)),
    "booted by stock": lambda *source: bridge_stock.process(booted_by_stock(*source)),
}
"""How a lean bridge comes to be processed."""


def _loads() -> list[tuple[str, str, str]]:
    """Case, dtype and road, those of one boot of stock's together.

    In float32 each case is processed from files and in place, after one boot or the other; some
    after both.
    """
    found = []
    for number, case_id in enumerate(CASES):
        in_place = ["booted lean", "booted by stock"]
        if case_id not in EVERY_FLAG:
            in_place = in_place[number % 2 :][:1]
        if case_id not in PROCESSED:
            found += [(case_id, dtype, "raw") for dtype in DTYPES]
            continue
        found += [(case_id, "float32", road) for road in ("raw", "from files", *in_place)]
        found += [(case_id, "bfloat16", road) for road in ("raw", "from files")]
    return found


@pytest.mark.parametrize(("case_id", "dtype", "road"), _loads())
def test_same_bridge(case_id: str, dtype: str, road: str, stock: Stock) -> None:
    if road == "raw":
        bridge, wanted = lean_raw(stock.folder, stock.dtype), stock.raw
    else:
        bridge, wanted = ROADS[road](stock.folder, stock.dtype), stock.processed
    assert isinstance(bridge, LeanTransformerBridge)
    assert without_values(bridge) == []
    apart = differences(wanted, stock.look(bridge))
    assert apart == []


def _flags() -> list[tuple[str, Flags]]:
    """Each flag alone off and all of them, for some; one for each of the others."""
    found: list[tuple[str, Flags]] = []
    for number, case_id in enumerate(PROCESSED):
        if case_id in EVERY_FLAG:
            found += [(case_id, {step: False}) for step in STEPS]
            found.append((case_id, NO_PROCESSING))
        else:
            alone = [{step: False} for step in STEPS] + [NO_PROCESSING]
            found.append((case_id, alone[number % len(alone)]))
    return found


def _flags_id(value: object) -> str:
    if isinstance(value, dict):
        return "without-" + "-".join(value)
    return str(value)


@pytest.mark.parametrize(("case_id", "flags"), _flags(), ids=_flags_id)
def test_same_bridge_with_flags(case_id: str, flags: Flags, bridge_zoo_folder: BridgeZoo) -> None:
    folder = bridge_zoo_folder(case_id)
    wanted = snapshot(bridge_stock.process(bridge_stock.boot(folder), **flags), case_id)
    apart = differences(wanted, snapshot(lean(folder, torch.float32, **flags), case_id))
    assert apart == []


def test_same_parameters_of_one_memory_in_place(bridge_zoo_folder: BridgeZoo) -> None:
    """TransformerLens gives an embedding that it has not changed another parameter there."""
    flags = dict.fromkeys(STEPS[-2:], False)
    for case_id in {"bart", "t5", "gpt2"} & CASES.keys():
        folder = bridge_zoo_folder(case_id)
        wanted = snapshot(bridge_stock.process(bridge_stock.boot(folder), **flags), case_id)
        with quiet():
            booted = LeanTransformerBridge.of(bridge_stock.boot(folder))
            booted.enable_compatibility_mode(disable_warnings=True, **flags)
        assert differences(wanted, snapshot(booted, case_id)) == []


@pytest.mark.parametrize("case_id", ["gpt2", "opt", "bloom"])
def test_same_bridge_with_even_factors(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    folder, flags = bridge_zoo_folder(case_id), {"refactor_factored_attn_matrices": True}
    wanted = snapshot(bridge_stock.process(bridge_stock.boot(folder), **flags), case_id)
    found = snapshot(lean(folder, torch.float32, **flags), case_id)
    apart = differences(wanted, found)
    assert apart == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("case_id", EVERY_FLAG)
def test_same_bridge_in_other_dtypes(
    case_id: str, dtype: torch.dtype, bridge_zoo_folder: BridgeZoo
) -> None:
    folder = bridge_zoo_folder(case_id)
    bridge = bridge_stock.boot(folder, dtype)
    wanted = snapshot(bridge_stock.process(bridge), case_id, forward=False)
    apart = differences(wanted, snapshot(lean(folder, dtype), case_id, forward=False))
    assert apart == []


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa", "gemma2", "mixtral"])
def test_a_file_in_bfloat16(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    """Widened, and as it is: then what no step touches is mapped."""
    folder = bridge_zoo_folder(case_id, dtype=torch.bfloat16)
    for dtype in DTYPES.values():
        bridge = bridge_stock.boot(folder, dtype)
        wanted = snapshot(bridge_stock.process(bridge), case_id)
        apart = differences(wanted, snapshot(lean(folder, dtype), case_id))
        assert apart == []


@pytest.mark.parametrize("case_id", [*WRONG_WHEN_PROCESSED, *STUMBLES])
def test_where_stock_is_wrong_we_are_right_or_say_so(
    case_id: str, bridge_zoo_folder: BridgeZoo
) -> None:
    folder = bridge_zoo_folder(case_id)
    stock = bridge_stock.boot(folder)
    wanted = bridge_stock.hf_log_probs(case_id, folder, type(stock.original_model))
    for make in (
        lambda: LeanTransformerBridge.from_pretrained_lean(folder, device="cpu", progress=False),
        lambda: _in_place(lean_raw(folder)),
        lambda: _in_place(LeanTransformerBridge.of(stock)),
    ):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", NumbersWarning)
            try:
                bridge = make()
            except LeanLoadError:
                continue  # refused by name
        warned = any(issubclass(text.category, NumbersWarning) for text in told)
        found = bridge_stock.log_probs(snapshot(bridge, case_id).logits)
        assert warned or (found - wanted).abs().max() < 1e-4


def _in_place(bridge: Any) -> Any:
    bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge


@pytest.mark.parametrize("case_id", [name for name in RAW_ONLY if name not in STUMBLES])
def test_what_stock_refuses_to_process(case_id: str, bridge_zoo_folder: BridgeZoo) -> None:
    """Refused here, too; a bridge that was to be processed is not returned."""
    folder = bridge_zoo_folder(case_id)
    with pytest.raises(Exception, match=RAW_ONLY[case_id]):
        lean(folder, torch.float32)
    bridge = lean_raw(folder)
    with pytest.raises(Exception, match=RAW_ONLY[case_id]):
        bridge_stock.process(bridge)
