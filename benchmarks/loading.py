"""What every road needs before it loads. Runs inside the measured process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_argument(name: str) -> dict[str, torch.dtype]:
    import transformers
    from packaging.version import Version

    renamed = Version(transformers.__version__) >= Version("4.56")
    return {"dtype" if renamed else "torch_dtype": torch_dtype(name)}


def import_architecture(folder: Path) -> None:
    """Import transformers' code for the model: an import, not a part of the load."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(folder))]


def blank_tokenizer() -> Any:
    """The smallest tokenizer that TransformerLens accepts, so that none is loaded.

    A new one for every load, since the model alters it.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    make: Any = PreTrainedTokenizerFast  # has no types in some versions
    return make(tokenizer_object=words, unk_token="<unk>")
