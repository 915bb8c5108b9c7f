"""What TransformerLens asks about a model while its own loading code runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tl_fastload.errors import ArgumentError
from tl_fastload.hooked import toy
from tl_fastload.hooked.config import config_dict
from tl_fastload.huggingface.pretrained import Pretrained
from tl_fastload.roads.observer import Observer


@dataclass
class Answers:
    """A pretrained model, as TransformerLens asks about it.

    Args:
        pretrained: the model.
        observer: told of what stock would hold; None unless that is wanted.

    Attributes:
        stock_name: the name that TransformerLens sees: the official one, or one that means nothing
            to it.
        n_layers: layers of the whole model, once its configuration is known.
    """

    pretrained: Pretrained
    observer: Observer | None = None

    def __post_init__(self) -> None:
        found = self.pretrained
        is_nameless_toy = self.is_toy and found.official is None
        self.stock_name = (
            toy.toy_name(found) if is_nameless_toy else stock_name_for(found.official, found.name)
        )
        self.n_layers: int | None = None

    @property
    def is_toy(self) -> bool:
        """Whether the model is one of the `.pth` toy models, whose tensors have TransformerLens'
        names.
        """
        return self.pretrained.config is None

    def hf_config_dict(self) -> dict[str, Any]:
        """The configuration of the caller's `hf_model`, or {}."""
        if self.pretrained.hf_model is None:
            return {}
        values: dict[str, Any] = self.pretrained.config.to_dict()
        values.pop("quantization_config", None)
        return values

    def config_dict(self, **kwargs: Any) -> dict[str, Any]:
        """What `convert_hf_model_config` returns."""
        fields, notes = config_dict(
            self.pretrained.config,
            official_name=self.pretrained.official,
            tokenizer_name=self.pretrained.tokenizer_name(),
            trust_remote_code=self.pretrained.keywords.trust_remote_code,
        )
        self.pretrained.notes.extend(notes)
        self.n_layers = fields["n_layers"]
        return fields

    def check_config(self, cfg: Any) -> None:
        """Raise ArgumentError if more layers are asked for than the model has."""
        if self.n_layers is not None and cfg.n_layers > self.n_layers:
            raise ArgumentError(
                f"first_n_layers={cfg.n_layers}, but {self.pretrained.label} has {self.n_layers} "
                "layers."
            )

    def tree(self, revision: str | None, dtype: Any) -> Any:
        """The Hugging Face module tree with promises for weights."""
        root = self.pretrained.tree(dtype, revision)
        if self.observer is not None:
            caller_holds = self.pretrained.hf_model is not None
            self.observer.hold(root.parameters(), caller_holds=caller_holds)
        return root

    def outline(self, cfg: Any) -> dict[str, Any] | None:
        """Promises under TransformerLens' names for a toy model whose file is not at hand and
        must not be downloaded; None for any other.
        """
        if not (self.is_toy and self.pretrained.headers_only):
            return None
        return toy.outline_of_toy(self.pretrained, cfg)

    def list_repo_files(self, *args: Any, **kwargs: Any) -> list[str]:
        """The files beside the weights of a toy model."""
        return self.pretrained.file_names()

    def download_file_from_hf(self, repo: str, file_name: str, **kwargs: Any) -> Any:
        """A toy model's JSON file as a dictionary, or its weights as promises."""
        if file_name == "config.json":
            fields = dict(self.pretrained.raw or {})
            self.n_layers = fields["n_layers"]
            return fields
        promises = toy.toy_weights(self.pretrained, file_name)
        if self.observer is not None:
            self.observer.hold(promises.values(), caller_holds=False)
        return promises


def stock_name_for(official_name: str | None, label: str) -> str:
    """A name that keeps TransformerLens' special cases for official models and means nothing to it
    otherwise.
    """
    if official_name is not None:
        return official_name
    # The last part becomes cfg.model_name, as it does for stock's own names.
    return f"checkpoint/{label.rstrip('/').rsplit('/', 1)[-1]}"
