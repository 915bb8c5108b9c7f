"""Loading a quantized checkpoint as an ordinary model: dequantized here where its format is known,
one parameter at a time, else by transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from tl_fastload.errors import ArgumentError, MissingWeightsError, UnsupportedArchitectureError
from tl_fastload.ground import compat
from tl_fastload.ground.hf_configs import declared_quantization, parts_of
from tl_fastload.ground.own_defaults import Defaults
from tl_fastload.huggingface.empty import for_an_empty_model
from tl_fastload.huggingface.keys import is_conv1d
from tl_fastload.quantized.formats import method_of, of_kind, own_format
from tl_fastload.quantized.spec import Spec

_ORDINARY = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dequantized_here(hf_config: Any, label: str) -> tuple[Any, Spec] | None:
    """How to read a quantized checkpoint as ordinary weights without transformers' own road.

    Returns:
        Its configuration as that of an ordinary model, and how it is quantized; None for a method
        that no format here reads.

    Raises:
        ArgumentError: the checkpoint is not quantized.
        QuantizationError: dequantizing takes a package that is not here.
    """
    if method_of(hf_config) is None:
        raise ArgumentError(f"{label} is not quantized: leave dequantize= out.")
    spec = own_format(hf_config)
    if spec is None:
        return None
    of_kind(spec.kind).require_device(torch.device("cpu"))
    config = copy.deepcopy(hf_config)
    _forget_quantization(config)
    return config, spec


def load_dequantized(
    folder: str | Path, hf_config: Any, dtype: torch.dtype, **hub_keywords: Any
) -> Any:
    """transformers' model of a quantized checkpoint with ordinary weights, on the CPU.

    It is transformers that loads: about two copies of the dequantized weights are in memory at a
    time.

    Args:
        folder: a folder or hub name.
        hf_config: its configuration.
        dtype: dtype of the weights.
        **hub_keywords: how to reach the files.

    Raises:
        ArgumentError: the checkpoint is not quantized.
        UnsupportedArchitectureError: transformers cannot load it here, or cannot dequantize what
            its method made.
    """
    method = method_of(hf_config)
    if method is None:
        raise ArgumentError(f"{folder} is not quantized: leave dequantize= out.")
    options: dict[str, Any] = {compat.CONFIG_DTYPE_NAME: dtype, **hub_keywords}
    try:
        config = _told_to_dequantize(declared_quantization(hf_config))
        if config is not None:
            options["quantization_config"] = config
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        with Defaults(dtype):  # which transformers sets itself, for all threads
            model, fitted = load(folder, output_loading_info=True, **options)
        if config is None:
            turned = [name for name, module in model.named_modules() if _was_conv1d(module)]
            model = model.dequantize(dtype)
            for name in turned:
                _turn_back(model, name)
    except Exception as error:
        # Every method has its own package, with exceptions of its own.
        raise UnsupportedArchitectureError(
            f"transformers {compat.TRANSFORMERS} cannot dequantize {folder} here, which is "
            f"quantized with {method} ({type(error).__name__}: {error}). Take the unquantized "
            "checkpoint, with quantize= if it is too large."
        ) from error
    _check(fitted, model, folder, method)
    _forget_quantization(model.config)
    return model.eval()


def outline_dequantized(folder: str | Path, hf_config: Any, dtype: torch.dtype) -> Any:
    """The form of what `load_dequantized` would load: its model on the meta device.

    Raises:
        ArgumentError: the checkpoint is not quantized.
    """
    if method_of(hf_config) is None:
        raise ArgumentError(f"{folder} is not quantized: leave dequantize= out.")
    config = for_an_empty_model(hf_config, None)
    with Defaults(dtype), torch.device("meta"):
        make: Any = transformers.AutoModelForCausalLM.from_config
        return make(config).eval()


def _forget_quantization(config: Any) -> None:
    for part in parts_of(config):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def _was_conv1d(module: Any) -> bool:
    """Whether transformers made a quantized layer, [out, in], of a `Conv1D`, [in, out]."""
    return is_conv1d(getattr(module, "source_cls", None))


def _turn_back(model: Any, name: str) -> None:
    """Put a `Conv1D` where a linear layer is, which is what dequantizing leaves."""
    parent, _, leaf = name.rpartition(".")
    linear = model.get_submodule(name)
    outputs, inputs = linear.weight.shape
    with torch.device("meta"):
        layer = Conv1D(outputs, inputs)  # type: ignore[no-untyped-call]
    layer.weight = torch.nn.Parameter(linear.weight.detach().t().contiguous())
    layer.bias = torch.nn.Parameter(
        torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias.detach()
    )
    setattr(model.get_submodule(parent), leaf, layer)


def _check(fitted: Mapping[str, Any], model: Any, folder: Any, method: str) -> None:
    """Raise for weights that transformers made up, and for those that it left without scales."""
    problems = [
        f"{what.replace('_keys', '')}: {name}"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in sorted(str(key) for key in fitted.get(what, ()))
    ]
    problems += [
        f"not dequantized, {parameter.dtype}: {name}"
        for name, parameter in model.named_parameters()
        if parameter.dtype not in _ORDINARY
    ]
    if problems:
        shown = "\n  ".join(problems[:10])
        raise MissingWeightsError(
            f"{folder} does not hold the weights that {method} makes:\n  {shown}\nNothing was "
            "loaded. Check that the checkpoint is complete and belongs to this config.json."
        )


def _told_to_dequantize(declared: Any) -> Any:
    """The configuration with `dequantize=True`, for methods that dequantize while they load."""
    from transformers.quantizers import auto  # which imports bitsandbytes

    fields = dict(declared if isinstance(declared, Mapping) else declared.to_dict())
    known: Any = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    method = fields.get("quant_method")
    kind = known.get(getattr(method, "value", method))
    if kind is None:
        return None
    config = kind.from_dict(fields)
    if not hasattr(config, "dequantize"):
        return None
    config.dequantize = True
    return config
