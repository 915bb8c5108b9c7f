"""One case of the benchmark, measured in a fresh process by `tl_fastload.cli.bench.process`."""

from __future__ import annotations

import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import copies, models
from benchmarks.quantized_checkpoints import make_quantized_checkpoint, weight_files
from tl_fastload.cli.bench.process import Measurement, measure, read_ahead
from tl_fastload.cli.bench.synthetic import ITEM_BYTES
from tl_fastload.report.available import available_host_bytes

__all__ = ["Case", "Measurement", "run_case"]

_IMPORTS_BYTES = 1 << 30


@dataclass(frozen=True)
class Case:
    """One load to measure.

    Attributes:
        model: a key of `benchmarks.models.SHAPES`.
        road: who loads: a key of `benchmarks.roads.ROADS` ("lean", "stock", "transformers",
            "floor", "reload", "touch", "save"), of `benchmarks.quantized_roads.ROADS` or of
            `benchmarks.bridge_roads.ROADS`.
        dtype: of the loaded parameters, a torch name such as "float32".
        processed: whether TransformerLens' processing (folding, centring) is on.
        strategy: passed to the lean loader.
        from_hf_model: the caller holds the Hugging Face model in memory and passes it.
        adapter: a LoRA adapter is merged too: by the lean loader, or by peft before stock.
        loads: how many times to load, each time letting the one before go.
        quantize: passed to the lean loader when the processed copy is made.
        forward_tokens: lengths of the batch-1 forward passes to time after the load.
        kind: how the loaded weights are quantized ("int8", "nf4"); empty for not at all.
        saved: they come quantized, from a checkpoint that transformers saved; otherwise they are
            quantized while they are loaded.
    """

    model: str
    road: str
    dtype: str
    processed: bool = True
    strategy: str = "auto"
    from_hf_model: bool = False
    adapter: bool = False
    loads: int = 1
    quantize: str | None = None
    forward_tokens: tuple[int, ...] = ()
    kind: str = ""
    saved: bool = False

    @property
    def name(self) -> str:
        """Short and unique, such as "llama-1.1b bfloat16 lean processed"."""
        parts = [self.model, self.dtype, self.road]
        if self.kind:
            parts[2:] = [self.kind, self.road, "saved" if self.saved else "quantize"]
        if self.road in ("lean", "stock", "densify") or self.road.startswith("bridge"):
            parts.append("processed" if self.processed else "unprocessed")
        if self.strategy != "auto":
            parts.append(self.strategy)
        if self.from_hf_model:
            parts.append("hf_model")
        if self.quantize is not None:
            parts.append(self.quantize)
        if self.adapter:
            parts.append("adapter")
        if self.loads > 1:
            parts.append(f"x{self.loads}")
        return " ".join(parts)


def run_case(case: Case, cache: Path | None = None) -> Measurement:
    """Measure one load in a fresh process, its checkpoint made and read into the page cache first.

    Args:
        case: what to load, and how.
        cache: folder of the benchmark checkpoints; default `models.default_cache()`.

    Returns:
        The measurement. When the process failed, or would not fit in memory, `error` says so.
    """
    if case.saved:
        folder = make_quantized_checkpoint(case.model, case.kind, cache).resolve()
    else:
        folder = models.make_checkpoint(case.model, cache).resolve()
    source, needed = folder, needed_bytes(case)
    if case.road in ("reload", "touch") and needed <= available_host_bytes():
        try:
            source = copies.make_copy(folder, case.dtype, case.quantize)
        except subprocess.CalledProcessError as error:
            return Measurement(case.name, error=f"failed: {error.stderr.decode()[-2000:]}")
    for path in weight_files(source):
        read_ahead(path)
    environment = {"HF_HOME": str(models.hub_home(folder)), "HF_HUB_OFFLINE": "1"}
    arguments = {"case": asdict(case), "folder": str(folder)}
    return measure("benchmarks.roads:prepare", arguments, case.name, environment, needed)


def needed_bytes(case: Case) -> int:
    """Memory that must be free for the case to be run, on the safe side."""
    shape = models.SHAPES[case.model]
    numbers = shape.file_numbers()
    # Stock's processing upcasts everything, whatever the dtype.
    if case.road in ("stock", "bridge-stock"):
        return _IMPORTS_BYTES + numbers * ITEM_BYTES["float32"] * 7 // 2
    held_by_caller = shape.file_bytes() if case.from_hf_model else 0
    return _IMPORTS_BYTES + held_by_caller + numbers * ITEM_BYTES[case.dtype] * 3 // 2
