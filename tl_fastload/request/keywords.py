"""The keyword arguments that `from_pretrained` hands on to Hugging Face, sorted by who takes
them.
"""

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass, field
from typing import Any

from tl_fastload.errors import ArgumentError

_HUB_KEYWORDS = (
    "revision",
    "cache_dir",
    "token",
    "local_files_only",
    "force_download",
    "subfolder",
    "gguf_file",
)
_FILE_KEYWORDS = ("variant", "use_safetensors")
# Ways of loading that transformers has and that change nothing here: weights are streamed anyway.
_WITHOUT_EFFECT = ("low_cpu_mem_usage", "attn_implementation", "proxies", "resume_download")


@dataclass
class Keywords:
    """The keyword arguments for Hugging Face, sorted by who takes them.

    Attributes:
        hub: how to find the files.
        files: which of the weight files to take.
        overrides: fields of the Hugging Face configuration to set.
        trust_remote_code: whether code of the checkpoint may run.
    """

    hub: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False


def sort_keywords(keywords: dict[str, Any]) -> Keywords:
    """Sort the keyword arguments that `from_pretrained` would hand to Hugging Face.

    Raises:
        ArgumentError: for one that contradicts how weights are loaded here.
    """
    found = Keywords()
    for name, value in keywords.items():
        if name == "use_auth_token":
            found.hub["token"] = value
        elif name in _HUB_KEYWORDS:
            found.hub[name] = value
        elif name in _FILE_KEYWORDS:
            found.files[name] = value
        elif name == "trust_remote_code":
            found.trust_remote_code = bool(value)
        elif name in ("device_map", "max_memory"):
            raise ArgumentError(
                f"{name}= is transformers' way to spread a model; here use device= and n_devices=."
            )
        elif name not in _WITHOUT_EFFECT:
            found.overrides[name] = value
    return found


def override(hf_config: Any, overrides: dict[str, Any]) -> Any:
    """A copy of a Hugging Face configuration with some fields set.

    Raises:
        ArgumentError: for a name that is no field of it.
    """
    if not overrides:
        return hf_config
    changed = copy.deepcopy(hf_config)
    for name, value in overrides.items():
        if not hasattr(changed, name):
            known = list(changed.to_dict())
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ArgumentError(
                f"{name}= is neither an argument of from_pretrained nor a field of this model's "
                f"configuration.{hint}"
            )
        setattr(changed, name, value)
    return changed
