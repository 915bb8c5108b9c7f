"""One call of `from_pretrained_lean`, as it goes from room to room."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tl_fastload.request.contradictions import check_arguments
from tl_fastload.request.options import Options


@dataclass(frozen=True)
class Request:
    """One call of `from_pretrained_lean`, its arguments sorted by who takes them.

    Attributes:
        cls: the model class, with `LeanLoadingMixin` among its bases.
        options: what TransformerLens' `from_pretrained` does not have.
        arguments: of TransformerLens' `from_pretrained`.
        keywords: for Hugging Face.
    """

    cls: type
    options: Options
    arguments: dict[str, Any]
    keywords: dict[str, Any]

    def check(self) -> None:
        """Raise for values that mean nothing, contradict each other or this machine."""
        self.options.check()
        check_arguments(self.arguments, self.keywords)

    def changed(self, **changes: Any) -> Request:
        """The same call with other arguments of TransformerLens' `from_pretrained`."""
        keywords = dict(self.keywords)
        if "dtype" in changes:
            keywords.pop("torch_dtype", None)
        return replace(self, arguments={**self.arguments, **changes}, keywords=keywords)

    def with_options(self, **changes: Any) -> Request:
        """The same call with other options."""
        return replace(self, options=replace(self.options, **changes))
