"""Model names as TransformerLens knows them."""

from __future__ import annotations

import difflib

from transformer_lens import loading_from_pretrained

# Official names whose weights the hub does not have.
NOT_ON_THE_HUB = frozenset(loading_from_pretrained.NON_HF_HOSTED_MODEL_NAMES)


def official_name(name: str) -> str | None:
    """The hub name behind a TransformerLens name or alias (any case); None when it has none."""
    return loading_from_pretrained.make_model_alias_map().get(name.lower())


def nearest_names(name: str, count: int = 3) -> list[str]:
    """Up to `count` official names and aliases that resemble `name`, best first."""
    known = loading_from_pretrained.make_model_alias_map()
    # Official names are shown as they are spelled; aliases are known in lower case only.
    return [
        known[key] if known[key].lower() == key else key
        for key in difflib.get_close_matches(name.lower(), known, n=count)
    ]
