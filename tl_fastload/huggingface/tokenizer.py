"""The files of a tokenizer, and the tokenizer that is made of them: never another one."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tl_fastload.errors import MissingFileError
from tl_fastload.ground.boundary import is_panic
from tl_fastload.printable import printable
from tl_fastload.source.links import check_all_links
from tl_fastload.source.location import Location, fetch, file_names

_HAS_ONE = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    "tokenizer_config.json",
)
_FILES = re.compile(
    r"(tokenizer|vocab|merges|special_tokens_map|added_tokens|chat_template|normalizer|spiece|bpe)"
    r".*\.(json|txt|model|jinja|bpe)$|.+\.(tiktoken|model)$"
)
# Files beside a tokenizer that its class does not read.
_NOT_READ = (".safetensors", ".bin", ".pth", ".pt", ".py", ".md")


def has_tokenizer(folder: Path) -> bool:
    """Whether a local folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in _HAS_ONE)


def fetch_tokenizer(location: Location, *, code: bool) -> Path:
    """Have the files of a repository's tokenizer, of its very commit; the folder that they are in.

    transformers would make an empty tokenizer of a repository without any.

    Args:
        location: of the model, on the hub.
        code: whether code that comes with the tokenizer may run, and is fetched.

    Raises:
        LeanLoadError: they cannot be had.
    """
    wanted = [
        name
        for name in file_names(location).files
        if "/" not in name and (_FILES.match(name) or (code and name.endswith(".py")))
    ]
    if not any(_FILES.match(name) for name in wanted):
        raise MissingFileError(f"{location.label} has no files of a tokenizer")
    for name in wanted:
        fetch(location, name)
    return location.folder


def read_tokenizer(folder: Path, **keywords: Any) -> Any:
    """The tokenizer in a folder, and never another one: what is not there is not fetched.

    Args:
        folder: where its files are.
        **keywords: of `AutoTokenizer.from_pretrained`.

    Raises:
        Exception: anything at all, as tokenizers do.
    """
    folder = folder.absolute()
    if not folder.is_dir():  # transformers would take it for a name on the hub
        raise FileNotFoundError(f"{folder} is no folder")
    check_all_links(folder, skip=_NOT_READ)
    return load_tokenizer(str(folder), {**keywords, "local_files_only": True})


def load_tokenizer(name: str, keywords: dict[str, Any]) -> Any:
    """The tokenizer that transformers finds under a name.

    Args:
        name: a folder or a hub name.
        keywords: of `AutoTokenizer.from_pretrained`.

    Raises:
        Exception: anything at all, as tokenizers do.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **keywords)
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the code in Rust
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not keywords["trust_remote_code"]:
        # Written in the tokenizer's own JSON, it would hold when TransformerLens reads it again.
        tokenizer.init_kwargs.pop("trust_remote_code", None)
    if "local_files_only" in tokenizer.init_kwargs:  # how it was had is no setting of it
        tokenizer.init_kwargs["local_files_only"] = False
    return tokenizer


def named(tokenizer: Any, name: str) -> Any:
    """The same tokenizer, which says that it comes from `name`: TransformerLens looks for "gemma"
    in it.
    """
    tokenizer.name_or_path = name
    if isinstance(getattr(tokenizer, "init_kwargs", None), dict):
        tokenizer.init_kwargs["name_or_path"] = name
    return tokenizer


def is_failure(error: BaseException) -> bool:
    """Whether a tokenizer's loading failed, and nobody wanted the program to stop."""
    return isinstance(error, Exception) or is_panic(error)


def lost_tokenizer(name: Any, error: BaseException) -> str:
    """Warn of a tokenizer that could not be loaded; the sentence is for the report as well."""
    text = " ".join(str(error).split())[:200]
    message = printable(
        f"No tokenizer could be loaded from {name} ({type(error).__name__}: {text}): the model has "
        "none. Pass token ids, or tokenizer=."
    )
    warnings.warn(message, stacklevel=2)
    return message
