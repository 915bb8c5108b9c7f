"""What a load did: strategy, versions, memory, time, processing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tl_fastload.ground import compat
from tl_fastload.ground.boundary import spelt
from tl_fastload.ground.memory_orders import FORWARD
from tl_fastload.ground.words import against, format_bytes, html_table, listed, text_table
from tl_fastload.report.memory import PeakSampler, unique_bytes
from tl_fastload.report.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """The result of one lean load, readable when printed and in a notebook.

    Attributes:
        strategy: "assign" or "copy".
        reason: why that strategy ran.
        torch_version: version of torch.
        transformers_version: version of transformers.
        transformer_lens_version: version of TransformerLens.
        source: folder, hub name with revision, or "hf_model".
        dtype: dtype of the parameters.
        device: device of the parameters; several are joined by commas.
        seconds: wall time of the whole call.
        parameter_bytes: bytes of the parameters, each storage once.
        peak_host_bytes: highest resident host memory above the start of the call, mapped file
            pages included.
        peak_anonymous_bytes: the part of it that is no page of a file.
        mapped_bytes: parameter bytes that are mapped from files instead of held in memory.
        peak_device_bytes: highest CUDA memory above the start of the call, on the fullest device
            that it uses (sampled, unless the process never had more before); None without CUDA.
        processing: each processing step -> "done", or "skipped: ..." with the reason.
        quantization: kind of the quantized weights; None for a model without.
        not_quantized: matrices of a quantized model that are dense -> why.
        adapters: the adapters that were merged, one line each.
        notes: anything else worth knowing, in sentences.
        missing_keys: weights of the model that `load_weights_(strict=False)` left as they were.
        unexpected_keys: keys that it did not use.
        timeline: memory over the time of the call, and its phases.
        revision: the hub commit of the source; None for folders.
        layout: memory order of the parameters, "forward" or "stock".
        cache: "hit: <folder>", "filled: <folder>" or "not filled: <reason>"; None without a cache.
    """

    strategy: str
    reason: str
    torch_version: str = str(compat.TORCH)
    transformers_version: str = str(compat.TRANSFORMERS)
    transformer_lens_version: str = str(compat.TRANSFORMER_LENS)
    source: str
    dtype: torch.dtype
    device: str
    seconds: float = 0.0
    parameter_bytes: int
    peak_host_bytes: int = 0
    peak_anonymous_bytes: int = 0
    mapped_bytes: int = 0
    peak_device_bytes: int | None = None
    processing: dict[str, str] = field(default_factory=dict)
    quantization: str | None = None
    not_quantized: dict[str, str] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    timeline: Timeline = field(default_factory=Timeline, repr=False)
    revision: str | None = None
    cache: str | None = None
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    layout: str = FORWARD

    @classmethod
    def of(cls, model: Any, **said: Any) -> LoadReport:
        """The report of a load into `model`, before `measured` adds time and memory.

        Args:
            model: a `HookedTransformer` with its weights.
            **said: any fields that the model does not say.
        """
        parameters = list(model.parameters())
        return cls(
            dtype=model.cfg.dtype,
            device=", ".join(sorted(map(str, {parameter.device for parameter in parameters}))),
            parameter_bytes=unique_bytes(parameters),
            layout=getattr(model, "_layout", FORWARD),
            **said,
        )

    def measured(self, sampler: PeakSampler, seconds: float) -> LoadReport:
        """The same report with the time that the call took, and its memory."""
        return replace(
            self,
            seconds=seconds,
            peak_host_bytes=sampler.peak_host_bytes,
            peak_anonymous_bytes=sampler.peak_anonymous_bytes,
            peak_device_bytes=sampler.peak_device_bytes,
            timeline=sampler.timeline(),
        )

    def rows(self) -> list[tuple[str, str]]:
        """The report as (label, text) pairs, in reading order."""
        rows = [
            ("source", self.source),
            ("strategy", f"{self.strategy} ({self.reason})"),
            ("dtype, device", f"{str(self.dtype).removeprefix('torch.')}, {self.device}"),
            ("time", f"{self.seconds:.2f} s"),
            ("parameters", format_bytes(self.parameter_bytes)),
            ("of these mapped", format_bytes(self.mapped_bytes)),
            ("peak host memory", self._peak(self.peak_host_bytes)),
            ("peak anonymous memory", self._peak(self.peak_anonymous_bytes)),
        ]
        if self.peak_device_bytes is not None:
            rows.append(("peak device memory", self._peak(self.peak_device_bytes)))
        rows += list(self.processing.items())
        rows += [("adapter", adapter) for adapter in self.adapters]
        if self.quantization is not None:
            rows.append(("quantization", self.quantization))
            rows += [("not quantized", text) for text in _by_reason(self.not_quantized)]
        versions = (
            f"torch {self.torch_version}, transformers {self.transformers_version}, "
            f"transformer_lens {self.transformer_lens_version}"
        )
        rows.append(("versions", versions))
        if self.layout != FORWARD:
            rows.append(("layout", self.layout))
        if self.cache is not None:
            rows.append(("cache", self.cache))
        for label, keys in (("missing", self.missing_keys), ("unexpected", self.unexpected_keys)):
            if keys:
                rows.append((f"{label} keys", f"{len(keys)}: {listed(keys, 5)}"))
        rows += [("note", note) for note in self.notes]
        return rows

    def _peak(self, size_bytes: int) -> str:
        return against(size_bytes, self.parameter_bytes, " of the parameters")

    def __str__(self) -> str:
        return text_table("LoadReport", self.rows())

    def _repr_html_(self) -> str:
        return html_table("LoadReport", self.rows())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: dtype as text, everything else as it is."""
        dtype = str(self.dtype).removeprefix("torch.")
        lists = {"adapters": list(self.adapters), "notes": list(self.notes)}
        return {**asdict(self), "dtype": dtype, **lists}

    @spelt
    def plot(self, stock: Any = None, path: str | Path | None = None) -> Any:
        """Draw the memory of this load over its time. Needs matplotlib.

        Args:
            stock: a stock load to draw beside it: what `tl_fastload.watch_memory()` gave, or its
                `Timeline`.
            path: a file to write as well; its ending says the format, such as ".png" or ".pdf".

        Returns:
            A `matplotlib.figure.Figure`, which notebooks show.

        Raises:
            ArgumentError: matplotlib is missing.
        """
        from tl_fastload.report.pictures import loads

        return loads.plot_load(self, stock, path)


def _by_reason(not_quantized: dict[str, str]) -> list[str]:
    """One line a reason, with the first of the names and how many there are."""
    names: dict[str, list[str]] = {}
    for name, reason in not_quantized.items():
        names.setdefault(reason, []).append(name)
    return [f"{listed(found, 1)} ({reason})" for reason, found in names.items()]
