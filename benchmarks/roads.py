"""The loaders that are compared. Runs inside the measured process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import models
from benchmarks.forward import sample_log_probs, time_forward
from benchmarks.measure import Case
from benchmarks.proc import own_memory

Load = Callable[[], Any]


def prepare(case: dict[str, Any], folder: str) -> tuple[Load, Callable[[Any], dict[str, Any]]]:
    """Import what the case needs, and return the load and the description of its result."""
    wanted = Case(**case)
    load = ROADS[wanted.road](wanted, Path(folder))
    repeated = _Repeated(load, wanted.loads) if wanted.loads > 1 else None

    def describe(loaded: Any) -> dict[str, Any]:
        facts = _describe(loaded, wanted)
        if repeated is not None:
            facts["growth_bytes"] = repeated.growth_bytes()
        return facts

    return repeated or load, describe


def _describe(loaded: Any, case: Case) -> dict[str, Any]:
    if isinstance(loaded, list):  # the floor has tensors, no model
        return {"parameter_bytes": viewed_bytes(loaded), "buffer_bytes": 0}
    facts: dict[str, Any] = {
        "parameter_bytes": viewed_bytes(loaded.parameters()),
        "buffer_bytes": viewed_bytes(loaded.buffers()),
        "forward_seconds": {str(n): time_forward(loaded, n) for n in case.forward_tokens},
    }
    if case.forward_tokens:
        facts["log_probs"] = sample_log_probs(loaded)
    report = getattr(loaded, "load_report", None)
    if report is not None:
        facts["report"] = {
            name: getattr(report, name)
            for name in ("strategy", "parameter_bytes", "peak_anonymous_bytes", "mapped_bytes")
        }
    return facts


def viewed_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that the tensors look at between them: what two of them share counts once, and
    what lies between the rows of a strided view does not count."""
    runs = [_runs(tensor) for tensor in tensors if tensor.numel()]
    if not runs:
        return 0
    starts = np.concatenate([start for start, _ in runs])
    ends = np.concatenate([start + length for start, length in runs])
    order = np.argsort(starts)
    starts, ends = starts[order], ends[order]
    reached = np.concatenate([starts[:1], np.maximum.accumulate(ends)[:-1]])
    return int(np.maximum(0, ends - np.maximum(starts, reached)).sum())


def _runs(tensor: torch.Tensor) -> tuple[np.ndarray[Any, Any], int]:
    """Addresses at which the contiguous runs of a tensor begin, and the length of each."""
    item_bytes = tensor.element_size()
    length = item_bytes
    starts = np.array([tensor.data_ptr()], dtype=np.int64)
    steps = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for step, size in ((step * item_bytes, size) for step, size in steps if step and size > 1):
        if step == length and len(starts) == 1:
            length *= size
        else:
            starts = np.add.outer(np.arange(size) * step, starts).ravel()
    return starts, length


class _Repeated:
    """Loads again and again, and keeps the last."""

    def __init__(self, load: Load, times: int) -> None:
        self._load = load
        self._times = times
        self._held: list[int] = []

    def __call__(self) -> Any:
        loaded = None
        for _ in range(self._times):
            loaded = None  # let go of the last one before the next is there
            gc.collect()
            loaded = self._load()
            gc.collect()
            self._held.append(own_memory().anonymous_bytes)
        return loaded

    def growth_bytes(self) -> int:
        """Private memory with the last model loaded, above that with the second.

        The first load is left out: it also fills the caches of the libraries.
        """
        return self._held[-1] - self._held[1]


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _floor(case: Case, folder: Path) -> Load:
    from benchmarks.floor import load_floor

    tied = models.SHAPES[case.model].tied_key
    return lambda: load_floor(models.weights_file(folder), _torch_dtype(case.dtype), twice=tied)


def _stock(case: Case, folder: Path) -> Load:
    """TransformerLens' own loader, not altered in any way, under a name that it knows."""
    from transformer_lens import HookedTransformer

    _import_architecture(folder)
    name = models.SHAPES[case.model].official_name
    function = (
        HookedTransformer.from_pretrained
        if case.processed
        else HookedTransformer.from_pretrained_no_processing
    )
    arguments: dict[str, Any] = {"dtype": _torch_dtype(case.dtype), "device": "cpu"}
    _blank_tokenizer()  # its imports
    return lambda: function(name, tokenizer=_blank_tokenizer(), **arguments)


def _lean(case: Case, folder: Path) -> Load:
    from tl_fastload import LeanHookedTransformer

    _import_architecture(folder)
    function = (
        LeanHookedTransformer.from_pretrained_lean
        if case.processed
        else LeanHookedTransformer.from_pretrained_no_processing_lean
    )
    arguments: dict[str, Any] = {
        "dtype": _torch_dtype(case.dtype),
        "device": "cpu",
        "strategy": case.strategy,
    }
    if case.from_hf_model:
        arguments["hf_model"] = _hf_model_in_memory(case, folder)
    _blank_tokenizer()  # its imports
    return lambda: function(folder, tokenizer=_blank_tokenizer(), **arguments)


def _transformers(case: Case, folder: Path) -> Load:
    from transformers import AutoModelForCausalLM

    _import_architecture(folder)
    arguments = {**_dtype_argument(case.dtype), **_fast_attention()}
    return lambda: AutoModelForCausalLM.from_pretrained(folder, **arguments)


ROADS: dict[str, Callable[[Case, Path], Load]] = {
    "floor": _floor,
    "lean": _lean,
    "stock": _stock,
    "transformers": _transformers,
}


def _fast_attention() -> dict[str, str]:
    import transformers
    from packaging.version import Version

    # Older ones have it for some models only.
    everywhere = Version(transformers.__version__) >= Version("4.48")
    return {"attn_implementation": "sdpa"} if everywhere else {}


def _dtype_argument(name: str) -> dict[str, torch.dtype]:
    import transformers
    from packaging.version import Version

    renamed = Version(transformers.__version__) >= Version("4.56")
    return {"dtype" if renamed else "torch_dtype": _torch_dtype(name)}


def _import_architecture(folder: Path) -> None:
    """Import transformers' code for the model: an import, not a part of the load."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(folder))]


def _blank_tokenizer() -> Any:
    """The smallest tokenizer that TransformerLens accepts, so that none is loaded.

    A new one for every load, since the model alters it.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    make: Any = PreTrainedTokenizerFast  # has no types in some versions
    # TransformerLens 2 makes a tokenizer anew, from its name, unless this one adds a BOS token.
    given = {"unk_token": "<unk>", "name_or_path": "", "add_bos_token": True}
    return make(tokenizer_object=words, **given)


def _hf_model_in_memory(case: Case, folder: Path) -> Any:
    """What a caller holds: the Hugging Face model in the file's dtype, in memory of its own."""
    from transformers import AutoModelForCausalLM

    stored = _dtype_argument(models.SHAPES[case.model].file_dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, **stored)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # transformers 5 leaves it in the mapped file
    return model
