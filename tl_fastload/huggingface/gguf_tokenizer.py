"""The tokenizer that a GGUF file's metadata describe, built by transformers' own conversion."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from tl_fastload.source.gguf import GgufHeader, read_gguf

_GGML = "tokenizer.ggml."
_ARRAYS = tuple(f"{_GGML}{name}" for name in ("tokens", "scores", "token_type", "merges"))
_FIELDS = {
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
    "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
    "add_space_prefix": "add_prefix_space",
    **{n: n for n in ("tokens", "scores", "token_type", "merges", "precompiled_charsmap")},
    **{n: n for n in ("bos_token_id", "eos_token_id")},
}
"""Keys of the metadata -> what transformers' conversion calls them."""
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_HOMES = ("transformers.integrations.gguf", "transformers.integrations.ggml")
"""Modules that have the conversion: of transformers 5.23 on, and from 4.41 on."""


def has_gguf_tokenizer(header: GgufHeader) -> bool:
    """Whether a file describes a tokenizer."""
    return f"{_GGML}tokens" in header.metadata and f"{_GGML}model" in header.metadata


def write_gguf_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file into a folder, as `save_pretrained` does.

    Args:
        path: the first file of the model.
        folder: where to.

    Raises:
        Exception: anything at all, as tokenizers do.
    """
    metadata = read_gguf(path, _ARRAYS).metadata
    convert = _conversion()
    fields = {
        ours: metadata[f"{_GGML}{key}"] for key, ours in _FIELDS.items() if _GGML + key in metadata
    }
    backend, more = convert(str(metadata["general.architecture"]), fields)
    settings = {**_settings(metadata), **more}
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=backend, **settings)
    tokenizer.save_pretrained(folder)


def _conversion() -> Any:
    for name in _HOMES:
        try:
            return importlib.import_module(name).convert_gguf_tokenizer
        except (ImportError, AttributeError):
            continue
    raise ImportError("tokenizers of GGUF files are built by transformers 4.41 or newer: update it")


def _settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata[f"{_GGML}tokens"]
    is_sentencepiece = metadata.get(f"{_GGML}model") == "llama"
    found: dict[str, Any] = {
        # Older files have no flag: llama.cpp then adds a BOS token to sentencepiece vocabularies.
        "add_bos_token": bool(metadata.get(f"{_GGML}add_bos_token", is_sentencepiece)),
        "add_eos_token": bool(metadata.get(f"{_GGML}add_eos_token", False)),
    }
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        found["chat_template"] = metadata["tokenizer.chat_template"]
    for key, name in _SPECIAL.items():
        number = metadata.get(f"{_GGML}{key}_token_id")
        if type(number) is int and 0 <= number < len(tokens):
            found[name] = tokens[number]
    return found
