"""The keyword arguments that `from_pretrained` hands on to Hugging Face, sorted by who takes
them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any

from tl_fastload.errors import ArgumentError
from tl_fastload.ground.words import nearest
from tl_fastload.source.hub import HubOptions

_HUB_KEYWORDS = (*(item.name for item in fields(HubOptions)), "subfolder", "gguf_file")
_FILE_KEYWORDS = ("variant", "use_safetensors")
_OTHER_KEYWORDS = ("torch_dtype", "trust_remote_code")
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
        function: that was called with them.
        arguments: names of the arguments that it takes.
        of_loading: names of those that `from_pretrained_lean` takes.
    """

    hub: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    function: str = "from_pretrained_lean"
    arguments: tuple[str, ...] = ()
    of_loading: tuple[str, ...] = ()

    def guess(self, name: str) -> str:
        """A question that names the argument nearest to a name that is none; "" without."""
        known = (*self.arguments, *_HUB_KEYWORDS, *_FILE_KEYWORDS, *_OTHER_KEYWORDS)
        close = nearest(name, (*known, *self.of_loading))
        if close is None:
            return ""
        if close == name:
            return " from_pretrained_lean takes it."
        where = "" if close in known else ", which from_pretrained_lean takes"
        return f" Did you mean {close}={where}?"


def sort_keywords(
    keywords: dict[str, Any],
    function: str,
    arguments: tuple[str, ...],
    of_loading: tuple[str, ...] = (),
) -> Keywords:
    """Sort the keyword arguments that `from_pretrained` would hand to Hugging Face.

    Args:
        keywords: under their names.
        function: that was called with them.
        arguments: names of the arguments that it takes.
        of_loading: names of those that `from_pretrained_lean` takes.

    Raises:
        ArgumentError: for one that contradicts how weights are loaded here.
    """
    found = Keywords(function=function, arguments=arguments, of_loading=of_loading)
    homes = dict.fromkeys(_HUB_KEYWORDS, found.hub) | dict.fromkeys(_FILE_KEYWORDS, found.files)
    for name, value in keywords.items():
        name = "token" if name == "use_auth_token" else name
        if name == "trust_remote_code":
            found.trust_remote_code = bool(value)
        elif name not in _WITHOUT_EFFECT:
            homes.get(name, found.overrides)[name] = value
    return found


def override(hf_config: Any, keywords: Keywords) -> Any:
    """A copy of a Hugging Face configuration with some fields set.

    Raises:
        ArgumentError: for a name that is no field of it.
    """
    if not keywords.overrides:
        return hf_config
    changed = copy.deepcopy(hf_config)
    for name, value in keywords.overrides.items():
        if not hasattr(changed, name):
            close = nearest(name, changed.to_dict())
            field_hint = f" Did you mean the field {close}=?" if close else ""
            raise ArgumentError(
                f"{name}= is neither an argument of {keywords.function} nor a field of this "
                f"model's configuration.{keywords.guess(name) or field_hint}"
            )
        setattr(changed, name, value)
    return changed
