"""Runs TransformerLens' own loading functions with our checkpoint behind them.

TransformerLens looks models up by name and lets transformers load them. Private copies of its
functions (`tl_fastload.ground.borrow`) find our answers where they would ask the hub, transformers
or the file system; everything else in them (guards, defaults, the choice of converter, the order
of steps) runs as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from types import SimpleNamespace
from typing import Any

from transformer_lens import HookedTransformer
from transformer_lens import loading_from_pretrained as loading

from tl_fastload.errors import ReplacedFunctionError
from tl_fastload.ground.borrow import SILENT, borrow, innermost
from tl_fastload.hooked.answers import Answers


class _Loading:
    """TransformerLens' loading module, with an `Answers` behind three of its functions.

    Attributes:
        was_asked: whether the weights were asked for here, and so not anywhere else.
    """

    def __init__(self, answers: Answers, quiet: bool = False) -> None:
        self._answers = answers
        self.was_asked = False
        self._silent: dict[str, Any] = SILENT if quiet else {}

    def __getattr__(self, name: str) -> Any:
        return getattr(loading, name)

    def get_official_model_name(self, model_name: str) -> str:
        return self._answers.stock_name

    def get_pretrained_model_config(self, model_name: str, **kwargs: Any) -> Any:
        answers = self._answers
        silent = self._silent
        own = {"HfApi": lambda: answers, "utils": _utilities(answers), **silent}
        names = {"get_official_model_name": _same}
        run = _borrow(
            "get_pretrained_model_config",
            needs=(*names, "Path", "convert_hf_model_config", "convert_neel_model_config"),
            Path=_NoPath,
            NEED_REMOTE_CODE_MODELS=(),
            convert_hf_model_config=lambda name, **kw: answers.config_dict(**kw),
            convert_neel_model_config=_late("convert_neel_model_config", **names, **own),
            get_checkpoint_labels=_late("get_checkpoint_labels", **names, **own),
            **names,
            **silent,
        )
        n_ctx = None
        if "n_ctx" not in signature(loading.get_pretrained_model_config).parameters:
            n_ctx = kwargs.pop("n_ctx", None)  # older than 2.17
        cfg = run(model_name, **{**kwargs, "hf_cfg": answers.hf_config_dict()})
        if n_ctx is not None:
            cfg.n_ctx = n_ctx
        answers.check_config(cfg)
        return cfg

    def get_pretrained_state_dict(
        self, model_name: str, cfg: Any, hf_model: Any = None, **kwargs: Any
    ) -> Any:
        answers = self._answers
        self.was_asked = True
        outline = answers.outline(cfg)
        if outline is not None:
            return outline
        tree = None
        if not (answers.is_toy or cfg.from_checkpoint):
            tree = answers.tree(None, kwargs.get("torch_dtype", kwargs["dtype"]))
        checkpoints = SimpleNamespace(
            from_pretrained=lambda name, **kw: answers.tree(
                kw["revision"], kw.get("dtype", kw.get("torch_dtype"))
            )
        )
        run = _borrow(
            "get_pretrained_state_dict",
            needs=("Path", "get_official_model_name", "AutoModelForCausalLM", "HfApi", "utils"),
            Path=_NoPath,
            NEED_REMOTE_CODE_MODELS=(),
            get_official_model_name=_same,
            AutoModelForCausalLM=checkpoints,
            HfApi=lambda: answers,
            utils=_utilities(answers),
            # Quantization is judged on the checkpoint's own configuration, before this.
            _refuse_unsupported_quantization=lambda cfg, hf_model: None,
            convert_olmo2_weights=_convert_olmo2_weights,
            **self._silent,
        )
        return run(model_name, cfg, tree, **kwargs)


def run_from_pretrained(
    answers: Answers,
    build: Callable[..., Any],
    model_name: str,
    quiet: bool = False,
    **arguments: Any,
) -> Any:
    """Run TransformerLens' own `HookedTransformer.from_pretrained`.

    Args:
        answers: what is known about the model.
        build: stands where the class is called: takes a configuration and a tokenizer, returns the
            empty model.
        model_name: only for messages.
        quiet: whether not to say what TransformerLens says of a load.
        **arguments: of `from_pretrained`, without `hf_model`.

    Returns:
        What `build` returned, after its `load_and_process_state_dict` has run.

    Raises:
        ReplacedFunctionError: something that cannot be borrowed stands in place of one of
            TransformerLens' functions.
    """
    # Versions differ in their defaults and in the arguments that they have.
    given = {name: value for name, value in arguments.items() if value is not None}
    if "checkpoint_label" in given:
        given["checkpoint_value"] = given.pop("checkpoint_label")
    own_loading = _Loading(answers, quiet)
    silent = SILENT if quiet else {}
    found = HookedTransformer.__dict__["from_pretrained"]
    run = borrow(
        innermost(found) or found,  # arguments bound on the way are given here anyhow
        label="HookedTransformer.from_pretrained",
        needs=("loading",),
        loading=own_loading,
        **silent,
    )
    model = run(build, model_name, **given)
    if not own_loading.was_asked:
        raise ReplacedFunctionError(
            "HookedTransformer.from_pretrained made a model without asking for its weights where a "
            "lean load gives them: it is not TransformerLens' own function. Put that back."
        )
    return model


def convert(answers: Answers, cfg: Any) -> dict[str, Any]:
    """Run TransformerLens' own weight converter.

    Args:
        answers: its `tree` gives the Hugging Face module tree.
        cfg: the HookedTransformerConfig; not changed.

    Returns:
        The weights under TransformerLens' names, unprocessed.
    """
    cfg = copy.copy(cfg)
    cfg.from_checkpoint = False  # what is converted is at hand, no step of a training run
    named: dict[str, Any] = _Loading(answers).get_pretrained_state_dict(
        answers.stock_name, cfg, dtype=cfg.dtype
    )
    return named


def _borrow(name: str, **arguments: Any) -> Callable[..., Any]:
    """A function of TransformerLens' loading module, borrowed."""
    return borrow(getattr(loading, name), label=f"{loading.__name__}.{name}", **arguments)


def _late(name: str, **replacements: Any) -> Callable[..., Any]:
    """The same, borrowed when it is called: most models need neither."""
    needs = ("get_official_model_name", "utils")
    return lambda *args, **kwargs: _borrow(name, needs=needs, **replacements)(*args, **kwargs)


def _utilities(answers: Answers) -> SimpleNamespace:
    return SimpleNamespace(
        download_file_from_hf=answers.download_file_from_hf,
        select_compatible_kwargs=lambda kwargs, function: {},
    )


def _convert_olmo2_weights(tree: Any, cfg: Any) -> Any:
    """OLMo 2 with grouped heads: TransformerLens' converter assumes one per query head, that of
    OLMo 3 does not.
    """
    grouped = cfg.n_key_value_heads is not None and hasattr(loading, "convert_olmo3_weights")
    return getattr(loading, f"convert_olmo{3 if grouped else 2}_weights")(tree, cfg)


def _same(name: str) -> str:
    return name


class _NoPath:
    """A path that never exists: what TransformerLens sees is a name, whatever lies in the working
    directory.
    """

    def __init__(self, *parts: str) -> None:
        self._parts = parts

    def exists(self) -> bool:
        return False
