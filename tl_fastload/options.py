"""How to load: strategy, mapping, progress."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tl_fastload import compat
from tl_fastload.errors import ArgumentError, StrategyError
from tl_fastload.lora_config import Requests
from tl_fastload.progress import Progress, ProgressOption
from tl_fastload.quantization import Quantization

OWN_ARGUMENTS = (
    *("strategy", "mmap", "progress", "quantize", "dequantize"),
    *("adapter", "requantize"),
)
"""Arguments of `from_pretrained_lean` that TransformerLens' `from_pretrained` does not have."""

_STRATEGIES = ("auto", "assign", "copy")
_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "fuse", "9p", "lustre", "gpfs", "afs", "ceph")


@dataclass
class Options:
    """The arguments of a load that TransformerLens does not have.

    Attributes:
        strategy: "auto", "assign" or "copy".
        mmap: "auto", True or False.
        progress: as `from_pretrained_lean` takes it.
        quantize: how to quantize matrices while they are loaded, or None.
        dequantize: whether transformers is to make ordinary weights of a quantized checkpoint.
        move_to_device: whether parameters go to the configured device.
        adapter: LoRA adapters to merge, with weights.
        requantize: whether adapters may be merged into weights that came quantized.
    """

    strategy: str = "auto"
    mmap: str | bool = "auto"
    progress: ProgressOption = None
    quantize: Quantization | None = None
    dequantize: bool = False
    move_to_device: bool = True
    adapter: Requests = ()
    requantize: bool = False

    def check(self) -> None:
        """Raise for values that mean nothing, or that this torch cannot do."""
        Progress(self.progress)
        if self.strategy not in _STRATEGIES:
            raise ArgumentError(f"strategy={self.strategy!r} is none of {', '.join(_STRATEGIES)}.")
        if not (self.mmap == "auto" or isinstance(self.mmap, bool)):
            raise ArgumentError(f'mmap={self.mmap!r} is none of "auto", True, False.')
        if self.strategy == "assign" and not compat.can_assign():
            raise StrategyError(
                f'strategy="assign" needs torch {compat.ASSIGN_NEEDS_TORCH} or newer, this is '
                f'{compat.TORCH}. Use strategy="auto", which copies here.'
            )

    @property
    def assigns(self) -> bool:
        """Whether finished tensors replace the model's own."""
        return self.strategy == "assign" or (self.strategy == "auto" and compat.can_assign())

    def reason(self) -> str:
        """Why that strategy runs, for the report."""
        if self.strategy != "auto":
            return "as asked for"
        if compat.can_assign():
            return f"torch {compat.TORCH} can assign"
        return f"torch {compat.TORCH} cannot assign, that takes {compat.ASSIGN_NEEDS_TORCH}"

    def may_map(self, checkpoint: Any | None) -> bool:
        """Whether untransformed weights of a checkpoint are mapped."""
        if checkpoint is None or self.mmap is False or not self.assigns:
            return False
        return self.mmap is True or not is_on_network(checkpoint.folder)


def is_on_network(folder: Path) -> bool:
    """Whether a folder lies on a file system that another machine serves, where a mapping may
    break any time.
    """
    real = folder.resolve()
    best, kind = "", ""
    for partition in psutil.disk_partitions(all=True):
        mount = partition.mountpoint
        inside = real == Path(mount) or Path(mount) in real.parents
        if inside and len(mount) >= len(best):
            best, kind = mount, partition.fstype
    return kind.lower().startswith(_NETWORK_FILE_SYSTEMS)
