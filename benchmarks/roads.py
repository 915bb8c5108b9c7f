"""The loaders that are compared. Runs inside the measured process."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import bridge_roads, copies, models, quantized_roads
from benchmarks.adapters import make_adapter
from benchmarks.forward import sample_log_probs, time_forward
from benchmarks.loading import dtype_argument
from benchmarks.measure import Case
from tl_fastload.cli.bench.loads import (
    blank_tokenizer,
    import_architecture,
    lean_load,
    stock_load,
    torch_dtype,
)
from tl_fastload.report.memory import host_memory

Load = Callable[[], Any]


def prepare(case: dict[str, Any], folder: str) -> tuple[Load, Callable[[Any], dict[str, Any]]]:
    """Import what the case needs, and return the load and the description of its result."""
    wanted = Case(**case)
    if wanted.road != "floor":  # every loader starts from the same imports
        importlib.import_module("transformer_lens")
    roads = quantized_roads.ROADS if wanted.kind else {**ROADS, **bridge_roads.ROADS}
    load = roads[wanted.road](wanted, Path(folder))
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
    if isinstance(loaded, int):  # bytes of files
        return {"parameter_bytes": loaded, "buffer_bytes": 0}
    parameters = list(quantized_roads.stored_tensors(loaded))
    facts: dict[str, Any] = {
        "parameter_bytes": viewed_bytes(parameters),
        "largest_parameter_bytes": max(viewed_bytes([one]) for one in parameters),
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
            self._held.append(host_memory().anonymous_bytes)
        return loaded

    def growth_bytes(self) -> int:
        """Private memory with the last model loaded, above that with the second.

        The first load is left out: it also fills the caches of the libraries.
        """
        return self._held[-1] - self._held[1]


def _floor(case: Case, folder: Path) -> Load:
    from benchmarks.floor import load_floor

    tied = models.SHAPES[case.model].tied_key
    return lambda: load_floor(models.weights_file(folder), torch_dtype(case.dtype), twice=tied)


def _stock(case: Case, folder: Path) -> Load:
    import_architecture(folder)
    merge = _merged_by_peft(case, folder) if case.adapter else None
    name = models.SHAPES[case.model].official_name
    return stock_load(name, case.dtype, case.processed, merge)


def _merged_by_peft(case: Case, folder: Path) -> Load:
    """What has to come before stock: transformers' model with the adapter merged into it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = make_adapter(case.model, folder)

    def merge() -> Any:
        base = AutoModelForCausalLM.from_pretrained(folder, **dtype_argument(case.dtype))
        with_adapter: Any = PeftModel.from_pretrained(base, adapter)
        return with_adapter.merge_and_unload()

    return merge


def _lean(case: Case, folder: Path) -> Load:
    import_architecture(folder)
    return lean_load(folder, case.dtype, case.processed, **lean_arguments(case, folder))


def lean_arguments(case: Case, folder: Path) -> dict[str, Any]:
    """What the lean loader is called with beside the dtype, and `tl_fastload.plan` too."""
    arguments: dict[str, Any] = {"strategy": case.strategy}
    if case.from_hf_model:
        arguments["hf_model"] = _hf_model_in_memory(case, folder)
    if case.adapter:
        import peft  # noqa: F401 - an import, not a part of the load

        arguments["adapter"] = make_adapter(case.model, folder)
    return arguments


def _reload(case: Case, folder: Path) -> Load:
    """A processed copy, mapped."""
    from tl_fastload import LeanHookedTransformer

    copy = copies.copy_folder(folder, case.dtype, case.quantize)
    blank_tokenizer()  # its imports
    load = LeanHookedTransformer.from_pretrained_lean
    return lambda: load(copy, device="cpu", tokenizer=blank_tokenizer())


def _touch(case: Case, folder: Path) -> Load:
    copy = copies.copy_folder(folder, case.dtype, case.quantize)
    return lambda: copies.touch_pages(copy)


def _save(case: Case, folder: Path) -> Load:
    """Saving a processed model that is in memory already."""
    model = _lean(case, folder)()
    target = folder.parent / f"{folder.name}-copies" / "saved"

    def save() -> Any:
        model.save_lean(target, progress=False)
        return model

    return save


def _transformers(case: Case, folder: Path) -> Load:
    from transformers import AutoModelForCausalLM

    import_architecture(folder)
    arguments = {**dtype_argument(case.dtype), **_fast_attention()}
    return lambda: AutoModelForCausalLM.from_pretrained(folder, **arguments)


ROADS: dict[str, Callable[[Case, Path], Load]] = {
    "floor": _floor,
    "lean": _lean,
    "reload": _reload,
    "save": _save,
    "stock": _stock,
    "touch": _touch,
    "transformers": _transformers,
}


def _fast_attention() -> dict[str, str]:
    import transformers
    from packaging.version import Version

    # Older ones have it for some models only.
    everywhere = Version(transformers.__version__) >= Version("4.48")
    return {"attn_implementation": "sdpa"} if everywhere else {}


def _hf_model_in_memory(case: Case, folder: Path) -> Any:
    """What a caller holds: the Hugging Face model in the file's dtype, in memory of its own."""
    from transformers import AutoModelForCausalLM

    stored = dtype_argument(models.SHAPES[case.model].file_dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, **stored)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # transformers 5 leaves it in the mapped file
    return model
