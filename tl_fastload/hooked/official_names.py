"""Model names as TransformerLens knows them."""

from __future__ import annotations

import os
from typing import Any

from transformer_lens import loading_from_pretrained

from tl_fastload.source.aliases import Aliases
from tl_fastload.source.hub import HubOptions
from tl_fastload.source.location import Location, locate


def aliases() -> Aliases:
    """The names that TransformerLens has for models."""
    return Aliases(
        library="TransformerLens",
        known=loading_from_pretrained.make_model_alias_map(),
        not_on_the_hub=frozenset(loading_from_pretrained.NON_HF_HOSTED_MODEL_NAMES),
    )


def official_name(name: str) -> str | None:
    """The hub name behind a TransformerLens name or alias (any case); None when it has none."""
    return aliases().official(name)


def resolve_model(name: str | os.PathLike[str], **hub: Any) -> Location:
    """`tl_fastload.source.location.locate` that knows TransformerLens' names as well.

    Args:
        name: as for `locate`.
        **hub: its subfolder, and the fields of `tl_fastload.source.hub.HubOptions`.
    """
    subfolder = hub.pop("subfolder", "")
    return locate(name, HubOptions(**hub), subfolder, aliases())
