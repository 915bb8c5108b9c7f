"""Names that a library has for models, beside those on the hub."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Aliases:
    """Names of models and what they are called on the hub; none of them without arguments.

    Attributes:
        library: whose names they are, for messages.
        known: a name or alias in lower case -> the name on the hub.
        not_on_the_hub: names of models whose weights the hub does not have.
    """

    library: str = ""
    known: Mapping[str, str] = field(default_factory=dict)
    not_on_the_hub: frozenset[str] = frozenset()

    def official(self, name: str) -> str | None:
        """The hub name behind a name or alias (any case); None when it has none."""
        return self.known.get(name.lower())

    def nearest(self, name: str, count: int = 3) -> list[str]:
        """Up to `count` official names and aliases that resemble `name`, best first."""
        # Official names are shown as they are spelled; aliases are known in lower case only.
        return [
            self.known[key] if self.known[key].lower() == key else key
            for key in difflib.get_close_matches(name.lower(), self.known, n=count)
        ]


NO_ALIASES = Aliases()
