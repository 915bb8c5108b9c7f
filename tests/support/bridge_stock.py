"""What unmodified TransformerLens and transformers make of a checkpoint of the bridge's zoo.

Nothing of tl_fastload is used. Stock's boot runs as a private copy with one global exchanged: the
function that looks for a processor of pictures and sounds would install torchvision with pip.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from tests.support import bridge_zoo

STEPS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
NO_PROCESSING = dict.fromkeys(STEPS, False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what stock prints, warns of and logs: a library's warnings are not the subject."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _without_processors(function: Any) -> Any:
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, "load_modality_processor": lambda *_, **__: None},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def boot(
    folder: Path, dtype: torch.dtype = torch.float32, device: str | None = "cpu", **arguments: Any
) -> TransformerBridge:
    """Stock's `TransformerBridge.boot_transformers` of a folder."""
    # TransformerLens 3's is a method that calls the function, 4's is the function.
    function = TransformerBridge.boot_transformers
    if "device_map" not in inspect.signature(function).parameters:
        raise TypeError(f"an unknown boot_transformers: {function}")
    if "load_modality_processor" in function.__globals__:
        function = _without_processors(function)
    with quiet():
        return function(str(folder), dtype=dtype, device=device, **arguments)


def process(bridge: TransformerBridge, **flags: bool) -> TransformerBridge:
    """Stock's compatibility mode, in place; returns the bridge."""
    with quiet():
        bridge.enable_compatibility_mode(disable_warnings=True, **flags)
    return bridge


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in float32: what centring the unembedding leaves alone."""
    return logits.float().log_softmax(-1)


def hf_log_probs(
    case_id: str, folder: Path, model_class: type, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Those of transformers' own model, eager, on the inputs of a case.

    model_class: the class of the bridge's `original_model`; hidden states count as logits.
    """
    with quiet():
        # The grouped kernel of experts wants rows of whole 16 bytes.
        model = model_class.from_pretrained(
            folder,
            torch_dtype=dtype,
            attn_implementation="eager",
            experts_implementation="eager",
            use_safetensors=any(folder.glob("*.safetensors")),
        ).eval()
        with torch.no_grad():
            output = model(**bridge_zoo.hf_inputs(case_id))
    return log_probs(output["logits"] if "logits" in output else output[0])
