"""Runs TransformerLens' own boot with our weights behind it.

`boot_transformers` asks transformers for a configuration, a tokenizer and a model by name. A
private copy of it (`tl_fastload.ground.borrow`) finds answers here; everything else in it (choice
of adapter, wrapping, hooks) runs as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from tl_fastload.bridge.versions import TOKENIZER_FUNCTIONS, stock_boot
from tl_fastload.ground.borrow import borrow, innermost
from tl_fastload.huggingface.empty import SkipRandomInit
from tl_fastload.huggingface.runnable import concrete_class, configuration_for

_CHOOSE = "get_hf_model_class_for_architecture"


class Answers(Protocol):
    """What TransformerLens' boot asks about a model."""

    def config(self, revision: str | None) -> Any:
        """transformers' configuration."""

    def tokenizer(self, name: str, **kwargs: Any) -> Any:
        """The tokenizer of that name; None for a model without one."""

    def model(self, model_class: Any, hf_config: Any, dtype: torch.dtype, attention: str) -> Any:
        """The transformers model, on promises."""


def run_boot(answers: Answers, cls: type, name: str, **arguments: Any) -> Any:
    """Run TransformerLens' own `boot_transformers`.

    Args:
        answers: what is known about the model.
        cls: stands where TransformerBridge is called.
        name: what the model is called.
        **arguments: of `boot_transformers`.

    Returns:
        The bridge, on promises.

    Raises:
        ReplacedFunctionError: something that cannot be borrowed stands in place of the function.
    """
    asked: list[Any] = []
    stock = stock_boot()
    found = (innermost(stock) or borrow(stock)).__globals__
    configure = next((name for name in TOKENIZER_FUNCTIONS if name in found), "")
    run = borrow(
        stock,
        label="TransformerBridge.boot_transformers",
        needs=("AutoConfig", "AutoTokenizer", "TransformerBridge", configure, _CHOOSE),
        AutoConfig=_Configurations(answers),
        AutoTokenizer=SimpleNamespace(from_pretrained=answers.tokenizer),
        TransformerBridge=cls,
        **_without_pip(found),
        **{
            _CHOOSE: lambda *a, **kw: _Models(answers, found[_CHOOSE](*a, **kw), asked),
            configure: _unless_none(found.get(configure)),
        },
    )
    if arguments.get("model_class") is not None:
        arguments["model_class"] = _Models(answers, arguments["model_class"], asked)
    with torch.no_grad(), SkipRandomInit():  # type: ignore[no-untyped-call]
        bridge = run(name, **arguments)
    for model in asked:
        model.__dict__.pop("to", None)
    return bridge


def boot_in_memory(cls: type, name: str, **arguments: Any) -> Any:
    """TransformerLens' own boot of a model that is in memory, or is made there, as a bridge of
    another class.
    """
    run = borrow(
        stock_boot(),
        label="TransformerBridge.boot_transformers",
        needs=("TransformerBridge",),
        TransformerBridge=cls,
        **_without_pip(stock_boot().__globals__),
    )
    return run(name, **arguments)


def _without_pip(found: dict[str, Any]) -> dict[str, Any]:
    """The function that looks for a model's processor of pictures and sounds, which installs
    torchvision where that is missing, without this.
    """
    name = "load_modality_processor"
    if name not in found:
        return {}
    return {name: borrow(found[name], _ensure_torchvision=lambda: False)}


def _unless_none(configure: Any) -> Callable[..., Any]:
    def call(tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
        return None if tokenizer is None else configure(tokenizer, *args, **kwargs)

    return call


class _Configurations:
    """Stands where transformers' AutoConfig is asked."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def from_pretrained(
        self, name: str, revision: str | None = None, output_attentions: bool = False, **kwargs: Any
    ) -> Any:
        config = copy.deepcopy(self._answers.config(revision))
        config._attn_implementation = "eager"  # any other refuses to be asked for attentions
        config.output_attentions = output_attentions
        return config


class _Models:
    """Stands where a model class of transformers is asked for a model."""

    def __init__(self, answers: Answers, stock: Any, asked: list[Any]) -> None:
        self._answers, self._stock, self._asked = answers, stock, asked
        self.__name__ = getattr(stock, "__name__", str(stock))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def from_pretrained(
        self,
        name: str,
        config: Any,
        torch_dtype: torch.dtype,
        attn_implementation: str = "eager",
        **kwargs: Any,
    ) -> Any:
        found = concrete_class(self._stock, config)
        model = self._answers.model(
            found, configuration_for(found, config), torch_dtype, attn_implementation
        )
        # Values are placed on their device when the recipes are complete.
        model.__dict__["to"] = lambda *a, **kw: model
        self._asked.append(model)
        return model
