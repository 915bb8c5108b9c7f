"""The loaders of quantized weights that are compared. Runs inside the measured process."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.loading import dtype_argument
from benchmarks.measure import Case
from benchmarks.quantized_checkpoints import GGUF, bnb_config, weight_files
from tl_fastload.cli.bench.loads import blank_tokenizer, import_architecture, torch_dtype

Load = Callable[[], Any]


def stored_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Everything that the parameters of a model consist of: bytes, scales and codes included."""
    for parameter in model.parameters():
        content = getattr(parameter, "content", None)  # of tl_fastload's quantized tensors
        if content is not None:
            yield from content.tensors().values()
            continue
        yield parameter.data
        state = getattr(parameter, "quant_state", None)  # of bitsandbytes' 4-bit weights
        scales = getattr(parameter, "SCB", None)  # of its 8-bit weights, until they first run
        for found in (state, getattr(state, "state2", None)):
            held = () if found is None else (found.absmax, found.code, found.offset)
            yield from (tensor for tensor in held if isinstance(tensor, torch.Tensor))
        if isinstance(scales, torch.Tensor):
            yield scales


def _lean(case: Case, folder: Path) -> Load:
    from tl_fastload import LeanHookedTransformer

    _import_kernels(folder)
    function = (
        LeanHookedTransformer.from_pretrained_lean
        if case.processed
        else LeanHookedTransformer.from_pretrained_no_processing_lean
    )
    arguments: dict[str, Any] = {"dtype": torch_dtype(case.dtype), "device": "cpu"}
    if not case.saved:
        arguments["quantize"] = bnb_config(case.kind, arguments["dtype"])
    if case.kind in GGUF:
        arguments["gguf_file"] = weight_files(folder)[0].name
    blank_tokenizer()  # its imports
    return lambda: function(folder, tokenizer=blank_tokenizer(), **arguments)


def _densify(case: Case, folder: Path) -> Load:
    """The same model without kernels: every use of a weight dequantizes it first."""
    from tl_fastload.quantized import ops

    ops._multiply = lambda *_: NotImplemented  # this process measures nothing else
    return _lean(case, folder)


def _transformers(case: Case, folder: Path) -> Load:
    from transformers import AutoModelForCausalLM

    _import_kernels(folder)
    arguments: dict[str, Any] = {
        **dtype_argument(case.dtype),
        "attn_implementation": "sdpa",
        "device_map": {"": "cpu"},
    }
    if not case.saved:
        arguments["quantization_config"] = bnb_config(case.kind, torch_dtype(case.dtype))
    load: Any = AutoModelForCausalLM.from_pretrained
    return lambda: load(folder, **arguments).eval()


def _transformers_exact(case: Case, folder: Path) -> Load:
    """Without the shortcut of 4-bit layers on some CPUs, which rounds the weights' values."""
    load = _transformers(case, folder)

    def without_shortcut() -> Any:
        model = load()
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    return without_shortcut


def _import_kernels(folder: Path) -> None:
    """Import transformers' code for the model and bitsandbytes: not a part of the load."""
    for name in ("bitsandbytes", "transformers.integrations", "transformers.quantizers.auto"):
        importlib.import_module(name)
    import_architecture(folder)


ROADS: dict[str, Callable[[Case, Path], Load]] = {
    "lean": _lean,
    "densify": _densify,
    "transformers": _transformers,
    "transformers-exact": _transformers_exact,
}
