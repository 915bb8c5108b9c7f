"""The tokenizer of a model: the one that lies with it, or the caller's, with nothing of it lost.

TransformerLens wants tokenizers that put a BOS token in front, and reads one that does not a
second time from the files that it names. What was added to it since (tokens, a chat template) is
lost then; so is one that has no files. Here such a tokenizer is made to do so as it is, and
TransformerLens finds nothing left to do.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerBase

from tl_fastload.ground.borrow import borrow
from tl_fastload.huggingface.tokenizer import load_tokenizer, named, read_tokenizer
from tl_fastload.printable import printable


class _Asked(Exception):  # noqa: N818  # an answer, not an error
    """What TransformerLens asks for, thrown out of its function."""

    def __init__(self, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.keywords = keywords


class _Stopped(Exception):  # noqa: N818  # likewise
    """TransformerLens has asked for nothing."""


def own_tokenizer(cfg: Any, folder: Path | None, hub: dict[str, Any], *, trust: bool) -> Any:
    """The tokenizer that a configuration names, under that name wherever its files lie.

    Args:
        cfg: a HookedTransformerConfig with a `tokenizer_name`.
        folder: where the files are; None to look for the name on the hub.
        hub: keyword arguments that say how to reach it.
        trust: whether code that comes with the tokenizer may run.

    Raises:
        Exception: anything at all, as tokenizers do.
    """
    keywords = _asked_by(HookedTransformer.__init__, cfg)
    if keywords is None:
        return None  # a model that TransformerLens has no tokenizer for
    keywords["trust_remote_code"] = trust
    if folder is None:
        keywords["token"] = hub.get("token", keywords.get("token"))
        known = ("cache_dir", "local_files_only")  # a revision is the model's
        keywords.update({name: hub[name] for name in known if hub.get(name)})
        return load_tokenizer(cfg.tokenizer_name, keywords)
    keywords.pop("token", None)
    return named(read_tokenizer(folder, **keywords), str(cfg.tokenizer_name))


def with_bos(tokenizer: Any, cfg: Any) -> Any:
    """A tokenizer as TransformerLens makes it, or itself if there is nothing to make of it.

    Args:
        tokenizer: of transformers; not changed.
        cfg: of the model; not changed.

    Returns:
        A tokenizer with the same tokens, templates and settings that puts a BOS token in front.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not _needs_bos(tokenizer, cfg):
        return tokenizer
    for make in (_switched, _reread):
        try:
            made = make(tokenizer)
        except Exception:  # tokenizers raise anything, and the next way may do
            continue
        if made is not None:
            return _like(made, tokenizer)
    try:
        made = copy.deepcopy(tokenizer)
    except Exception:
        return tokenizer
    # As TransformerLens does where it cannot be done: it prepends the token itself.
    return _like(made, tokenizer)


def _needs_bos(tokenizer: Any, cfg: Any) -> bool:
    """Whether TransformerLens would read the tokenizer again."""
    adds = tokenizer.init_kwargs.get("add_bos_token")
    adds = getattr(tokenizer, "add_bos_token", False) if adds is None else adds
    if adds or tokenizer.bos_token is None:
        return False
    return _asked_by(HookedTransformer.set_tokenizer, copy.copy(cfg), tokenizer) is not None


def _switched(tokenizer: Any) -> Any | None:
    """A copy with the switch that newer tokenizers have for it; None without such a switch."""
    switch = inspect.getattr_static(type(tokenizer), "add_bos_token", None)
    if not isinstance(switch, property) or switch.fset is None:
        return None
    made = copy.deepcopy(tokenizer)
    made.add_bos_token = True
    return made


def _reread(tokenizer: Any) -> Any:
    """What TransformerLens does, by way of files of the tokenizer as it is now."""
    with tempfile.TemporaryDirectory(prefix="tl_fastload-") as folder:
        tokenizer.save_pretrained(folder)
        made = type(tokenizer).from_pretrained(folder, add_bos_token=True, local_files_only=True)
    if hasattr(tokenizer, "vocab_file"):
        made.vocab_file = tokenizer.vocab_file
    return made


def _like(made: Any, tokenizer: Any) -> Any:
    made.init_kwargs["add_bos_token"] = True  # so that nobody reads it again
    for name in ("padding_side", "truncation_side", "chat_template"):
        if hasattr(tokenizer, name):
            setattr(made, name, getattr(tokenizer, name))
    return named(made, tokenizer.name_or_path)


def _asked_by(function: Callable[..., Any], cfg: Any, tokenizer: Any = None) -> Any | None:
    """What one of TransformerLens' functions asks transformers for; None for nothing.

    Args:
        function: `__init__`, or `set_tokenizer` with a tokenizer.
        cfg: the configuration.
        tokenizer: for `set_tokenizer`.
    """

    def ask(*args: Any, **keywords: Any) -> Any:
        raise _Asked(keywords)

    def stop(*args: Any) -> Any:
        raise _Stopped

    run = borrow(
        inspect.unwrap(function),
        AutoTokenizer=SimpleNamespace(from_pretrained=ask),
        utils=SimpleNamespace(get_tokenizer_with_bos=ask),
        Embed=stop,  # the first part of the model: the tokenizer is done with
        warnings=SimpleNamespace(warn=lambda *args, **keywords: None),
    )
    model: Any = object.__new__(HookedTransformer)
    try:
        if tokenizer is None:
            run(model, cfg)
        else:
            run(SimpleNamespace(cfg=cfg), tokenizer)
    except _Asked as asked:
        return asked.keywords
    except _Stopped:
        pass
    return None


def warn_of_ids(model: Any) -> None:
    """Warn if a model's tokenizer has ids that its embedding has no rows for."""
    tokenizer, rows = getattr(model, "tokenizer", None), model.cfg.d_vocab
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    added = {int(number): str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    beyond = [token for number, token in sorted(added.items()) if number >= rows]
    count = max([len(tokenizer), *(number + 1 for number in added)])
    if count > rows:
        such = f", such as {beyond[0]!r}" if beyond else ""
        message = (
            f"The tokenizer has ids up to {count - 1:,}, and the model's embedding has rows for "
            f"{rows:,} only: tokens beyond{such} cannot be embedded. Pass the tokenizer that "
            "belongs to these weights, or load weights with a resized vocabulary."
        )
        warnings.warn(printable(message), stacklevel=2)
