"""What the arguments of the public functions may be: asked once, where they come in."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tl_fastload.errors import ArgumentError
from tl_fastload.request.steps import STEPS

Test = tuple[Callable[[Any], bool], str]

_FLAGS = (
    *STEPS,
    *("move_to_device", "dequantize", "requantize", "verify", "check_memory", "check_base"),
    *("strict", "load_weights", "no_processing", "disable_warnings", "verbose"),
)
_FLAG_KEYWORDS = (
    *("local_files_only", "force_download", "trust_remote_code", "use_safetensors"),
    *("load_in_8bit", "load_in_4bit"),
)
DTYPES_BY_NAME = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
"""The names of dtypes that TransformerLens takes."""

DEVICE_MAPS = ("auto", "balanced", "sequential")
"""Device maps that accelerate makes, as in transformers: "auto" is "balanced"."""

_HINTS = {"tokenizer": " A name alone is not enough."}
_MOST_SHOWN = 80
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _is_flag(value: Any) -> bool:
    # 0 and 1 are flags everywhere in Python; a text that says "False" would be true.
    return isinstance(value, (bool, np.bool_)) or (_is_number(value) and value in (0, 1))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_amount(value: Any) -> bool:
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and isinstance(os.fspath(value), str)


def _is_dtype(value: Any) -> bool:
    if isinstance(value, str):
        return value in DTYPES_BY_NAME
    return isinstance(value, torch.dtype) and value in _DTYPES


def _is_quantization(value: Any) -> bool:
    if isinstance(value, (str, Mapping)) or value is False:
        return True
    return callable(getattr(value, "to_dict", None)) and not isinstance(value, type)


def _either(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def _from(least: int) -> Test:
    return lambda value: _is_number(value) and value >= least, f"no whole number of {least} or more"


_TEXT: Test = (_either(str), "no string")
_PATH: Test = (_is_path, "neither a string nor a path")
_TOKEN: Test = (_either(str, bool), "neither a string nor True or False")
_NUMBER: Test = (_is_number, "no whole number")
_DTYPE: Test = (
    _is_dtype,
    "neither a floating torch.dtype of 16 bits or more nor one of " + ", ".join(DTYPES_BY_NAME),
)
_SIDE: Test = (
    lambda value: isinstance(value, str) and value in ("left", "right"),
    'neither "left" nor "right"',
)
_DEVICE: Test = (
    lambda value: isinstance(value, (str, torch.device)) or _is_number(value),
    'no device: pass a name such as "cuda:0", or a torch.device',
)
_TOKENIZER: Test = (
    _either(PreTrainedTokenizerBase),
    "no tokenizer of transformers: pass what AutoTokenizer.from_pretrained(...) returns",
)
_QUANTIZE: Test = (
    _is_quantization,
    'none of "8bit", "nf4", "fp4" and a transformers.BitsAndBytesConfig',
)

_DEVICE_MAP: Test = (
    lambda value: (
        value in DEVICE_MAPS
        if isinstance(value, str)
        else isinstance(value, Mapping) and len(value) > 0
    ),
    f"neither a mapping of modules to devices nor one of {', '.join(DEVICE_MAPS)}",
)

_TESTS: dict[str, Test] = {
    **dict.fromkeys(_FLAGS, (_is_flag, "neither True nor False")),
    "folder": _PATH,
    "model_name": _PATH,
    "state_dict": (_either(Mapping), "no state dict: pass names with tensors"),
    "dtype": _DTYPE,
    "n_devices": _from(1),
    "max_shard_bytes": _from(1),
}
_TESTS_OR_NONE: dict[str, Test] = {
    **dict.fromkeys(_FLAG_KEYWORDS, (_is_flag, "none of True, False and None")),
    **dict.fromkeys(("checkpoint_index", "checkpoint_value", "checkpoint_label"), _NUMBER),
    **dict.fromkeys(("revision", "subfolder", "variant", "gguf_file"), _TEXT),
    **dict.fromkeys(("token", "use_auth_token"), _TOKEN),
    "cache_dir": _PATH,
    "default_prepend_bos": (_is_flag, "none of True, False and None"),
    "default_padding_side": _SIDE,
    "device": _DEVICE,
    "device_map": _DEVICE_MAP,
    "first_n_layers": _from(0),
    "max_bytes": (_is_amount, "no number"),
    "max_memory": (_either(Mapping), "no mapping of devices to bytes"),
    "n_ctx": _from(1),
    "processing": (_either(Mapping), "no mapping of steps to True or False"),
    "quantization_config": _QUANTIZE,
    "quantize": _QUANTIZE,
    "tokenizer": _TOKENIZER,
    "torch_dtype": _DTYPE,
    "unused_days": (_is_amount, "no number"),
}


def checked(**arguments: Any) -> dict[str, Any]:
    """The arguments of a public function, numbers and flags of other libraries made Python's own.

    Args:
        **arguments: under their names; those that nothing is known of stay as they are.

    Raises:
        ArgumentError: one that is of another kind than it has to be; names it.
    """
    found = {}
    for name, value in arguments.items():
        test = _TESTS.get(name)
        if test is None and value is not None:
            test = _TESTS_OR_NONE.get(name)
        if test is not None and not test[0](value):
            hint = _HINTS.get(name, "") if isinstance(value, str) else ""
            raise ArgumentError(f"{name}={_shown(value)} is {test[1]}.{hint}")
        if test is not None and _is_number(value):
            value = operator.index(value)
        found[name] = bool(value) if test is not None and test[0] is _is_flag else value
    return found


def checked_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments for Hugging Face, without those that are None and so the default.

    Raises:
        ArgumentError: one that is of another kind than it has to be; names it.
    """
    found = checked(**keywords)
    for name in found.keys() & (_TESTS.keys() | _TESTS_OR_NONE.keys()):
        if found[name] is None:
            del found[name]
    if "torch_dtype" in found:  # TransformerLens takes it as it is, where it means a torch.dtype
        found["torch_dtype"] = DTYPES_BY_NAME.get(found["torch_dtype"], found["torch_dtype"])
    return found


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}... ({type(value).__name__})"
