"""The loads that `tl-fastload bench` compares. Runs inside the measured process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tl_fastload.ground import compat
from tl_fastload.report.memory import unique_bytes
from tl_fastload.report.timeline import PhaseWatch

Load = Callable[..., Any]


@dataclass(frozen=True)
class Contender:
    """One way to load.

    Attributes:
        loader: "lean" or "stock".
        dtype: of the loaded parameters, a torch name such as "float32".
        processed: whether TransformerLens' processing (folding, centring) is on.
        strategy: passed to the lean loader.
        quantize: passed to the lean loader.
        road: into which class, "hooked" or "bridge".
    """

    loader: str
    dtype: str
    processed: bool = True
    strategy: str = "auto"
    quantize: str | None = None
    road: str = "hooked"

    @property
    def name(self) -> str:
        """Short and unique, such as "lean float32"."""
        parts = [self.loader, self.quantize or self.dtype]
        if not self.processed:
            parts.append("unprocessed")
        if self.road != "hooked":
            parts.append(self.road)
        if self.strategy != "auto":
            parts.append(self.strategy)
        return " ".join(parts)


def prepare(
    contender: dict[str, Any], model: str, stock_name: str, folder: str
) -> tuple[Load, Callable[[Any], dict[str, Any]]]:
    """Import what a load needs; return the load and the description of its result.

    Args:
        contender: fields of a `Contender`.
        model: what the lean loader loads.
        stock_name: what stock TransformerLens loads.
        folder: where `config.json` lies.
    """
    wanted = Contender(**contender)
    with contextlib.suppress(ValueError, KeyError):  # transformers does not know the toy models
        import_architecture(Path(folder))
    how = wanted.dtype, wanted.processed
    if wanted.loader == "stock":
        is_bridge = wanted.road == "bridge"
        return _with_phases(
            _stock_bridge(folder, *how) if is_bridge else stock_load(stock_name, *how)
        )
    own = {"strategy": wanted.strategy, "quantize": wanted.quantize}
    more: dict[str, Any] = {n: value for n, value in own.items() if value not in ("auto", None)}
    return lean_load(model, *how, wanted.road, **more), _describe_lean


def _with_phases(load: Load) -> tuple[Load, Callable[[Any], dict[str, Any]]]:
    watch = PhaseWatch()

    def act() -> Any:
        with watch:
            return load()

    return act, lambda loaded: {
        "parameter_bytes": unique_bytes(loaded.parameters()),
        "phases": [asdict(phase) for phase in watch.phases],
    }


def _describe_lean(loaded: Any) -> dict[str, Any]:
    report = loaded.load_report
    return {
        "parameter_bytes": report.parameter_bytes,
        "mapped_bytes": report.mapped_bytes,
        "phases": [asdict(phase) for phase in report.timeline.phases],
        "notes": list(report.notes),
    }


def stock_load(name: str, dtype: str, processed: bool, hf_model: Load | None = None) -> Load:
    """TransformerLens' own loader, not altered in any way, under a name that it knows.

    Args:
        name: an official name.
        dtype: of the parameters.
        processed: whether the weights are processed.
        hf_model: makes the model that is passed as `hf_model=`, as a part of the load.
    """
    from transformer_lens import HookedTransformer

    way = "from_pretrained" if processed else "from_pretrained_no_processing"
    load = _with_dtype(getattr(HookedTransformer, way), name, dtype)
    return load if hf_model is None else lambda: load(hf_model=hf_model())


def lean_load(
    model: str | Path, dtype: str, processed: bool, road: str = "hooked", **more: Any
) -> Load:
    """This package's loader; an unprocessed bridge is booted, which takes fewer arguments."""
    from tl_fastload.faces import lean_class

    if more.get("quantize"):
        from tl_fastload.quantized import formats

        spec = formats.read_quantization(more["quantize"])
        if spec is not None:  # imports kernels, which is not a part of the load
            formats.of_kind(spec.kind).require_device(torch.device("cpu"))
    raw = "boot_transformers_lean" if road == "bridge" else "from_pretrained_no_processing_lean"
    load = getattr(lean_class(road), "from_pretrained_lean" if processed else raw)
    return partial(_with_dtype(load, model, dtype), **more)


def _with_dtype(load: Load, model: str | Path, dtype: str) -> Load:
    """The load with a blank tokenizer, onto the CPU unless it is called with another `device`."""
    blank_tokenizer()  # its imports
    arguments: dict[str, Any] = {"dtype": torch_dtype(dtype), "device": "cpu"}
    return lambda **more: load(model, **{"tokenizer": blank_tokenizer(), **arguments, **more})


def _stock_bridge(folder: str, dtype: str, processed: bool) -> Load:
    """TransformerLens' own TransformerBridge of a folder, in compatibility mode if processed."""
    from transformer_lens.model_bridge import TransformerBridge

    boot = _with_dtype(TransformerBridge.boot_transformers, folder, dtype)

    def act() -> Any:
        bridge = boot()
        if processed:
            bridge.enable_compatibility_mode(disable_warnings=True)
        return bridge

    return act


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name such as "bfloat16"."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def import_architecture(folder: Path) -> None:
    """Import transformers' code for the model: an import, not a part of the load."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(folder))]


def blank_tokenizer() -> Any:
    """The smallest tokenizer that TransformerLens accepts, so that none is loaded.

    A new one for every load, since the model alters it.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    make: Any = PreTrainedTokenizerFast  # has no types in some versions
    # TransformerLens 2 would load it again by its name, unless it adds BOS tokens.
    again = {"name_or_path": "", "add_bos_token": True} if compat.RELOADS_TOKENIZERS else {}
    return make(tokenizer_object=words, unk_token="<unk>", **again)
