"""TransformerLens' HookedTransformer: its own code run on promises, and the empty model.

Must not know planning, copies or reports.
"""

from __future__ import annotations

from tl_fastload.ground import compat

compat.require_hooked_transformer()

from transformer_lens import HookedTransformer  # noqa: E402  # newer versions have none

__all__ = ["HookedTransformer"]
