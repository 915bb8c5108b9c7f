"""TransformerLens' search for names that a state dict does not have, kept to one layer."""

from __future__ import annotations

import weakref
from typing import Any

from tl_fastload.hooked.processing import _Layers


def _search(state_dict: dict[str, Any], key: str, layer: int | None = None) -> str:
    """As TransformerLens 3.9's."""
    _, number, suffix = key.split(".", 2)
    for name in state_dict:
        _search.looks += 1  # type: ignore[attr-defined]
        if name.endswith(f".{suffix}") and f".{number}." in name:
            return name
    return key


def _names(count: int) -> dict[str, Any]:
    names = (f"blocks.{n}.mlp.{leaf}" for n in range(count) for leaf in ("W_in", "experts.1.W_in"))
    return dict.fromkeys([*names, "model.layers.3.mlp.b_in", "ln_final.w"])


def test_names_are_found_as_transformer_lens_finds_them() -> None:
    _search.looks = 0  # type: ignore[attr-defined]
    layers, names = _Layers(_search), _names(5)
    for leaf in ("mlp.W_in", "mlp.b_in", "W_in", "none"):
        for number in range(7):
            key = f"blocks.{number}.{leaf}"
            wanted = key if key in names else _search(names, key)
            assert layers.find(names, key) == wanted
    names["model.layers.4.mlp.b_in"] = None
    assert layers.find(names, "blocks.4.mlp.b_in") == "model.layers.4.mlp.b_in"


def test_a_search_holds_no_state_dict() -> None:
    """The forecast of stock's memory counts what is alive."""
    _search.looks = 0  # type: ignore[attr-defined]
    layers, names = _Layers(_search), _names(3)
    names["ln_final.w"] = type("Weight", (), {})()
    weight = weakref.ref(names["ln_final.w"])
    layers.find(names, "blocks.1.mlp.b_gate")
    del names
    assert weight() is None


def test_looks_grow_with_the_number_of_layers() -> None:
    looks = []
    for count in (100, 200):
        _search.looks = 0  # type: ignore[attr-defined]
        layers, names = _Layers(_search), _names(count)
        for number in range(2, count):
            layers.find(names, f"blocks.{number}.mlp.b_gate")
        looks.append(_search.looks)  # type: ignore[attr-defined]
    assert looks[1] <= 2.1 * looks[0]
