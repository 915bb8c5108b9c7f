"""How to load: strategy, mapping, memory order, progress."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tl_fastload.errors import ArgumentError, StrategyError
from tl_fastload.ground import compat
from tl_fastload.ground.memory_orders import FORWARD, check_layout
from tl_fastload.quantized.spec import Spec
from tl_fastload.report.progress import Progress, ProgressOption
from tl_fastload.request.adapters import Requests

DEFAULT_DTYPE: str = type("DefaultDtype", (str,), {})("float32")
"""The default of `dtype=`: float32 for a checkpoint, and what was saved for a processed copy."""

DEFAULT_LAYOUT: str = type("DefaultLayout", (str,), {})(FORWARD)
"""The default of `layout=`: "forward" for a checkpoint, and what was saved for a processed copy."""

_STRATEGIES = ("auto", "assign", "copy")
_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "fuse", "9p", "lustre", "gpfs", "afs", "ceph")


@dataclass
class Options:
    """The arguments of `from_pretrained_lean` that TransformerLens' `from_pretrained` does not
    have.

    Attributes:
        strategy: "auto", "assign" or "copy".
        mmap: "auto", True or False.
        progress: as `from_pretrained_lean` takes it.
        quantize: how to quantize matrices while they are loaded, or None.
        dequantize: whether to make ordinary weights of a quantized checkpoint.
        check_memory: whether to refuse a load that will not fit.
        cache: None, False, True or a folder: whether, and where, processed copies are kept.
        verify: whether every byte of a processed copy is compared with its checksums.
        adapter: LoRA adapters to merge, with weights.
        requantize: whether adapters may be merged into weights that came quantized.
        check_base: whether an adapter whose base is another model is refused.
        layout: memory order of the parameters, "forward" or "stock".
        mesh: the processes that share the model, or None.
        parallel: how they do, "fsdp" or "tp"; None without a mesh.
        device_map: where the parts of the model go; None for all on `device=`.
        max_memory: what a map that is made here may take of each device.
    """

    strategy: str = "auto"
    mmap: str | bool = "auto"
    progress: ProgressOption = None
    quantize: Spec | None = None
    dequantize: bool = False
    check_memory: bool = True
    cache: bool | str | Path | None = None
    verify: bool = False
    adapter: Requests = ()
    requantize: bool = False
    check_base: bool = True
    layout: str = DEFAULT_LAYOUT
    mesh: Any = None
    parallel: str | None = None
    device_map: Any = None
    max_memory: Any = None

    def check(self) -> None:
        """Raise for values that mean nothing, or that this torch cannot do."""
        Progress(self.progress)
        if not (isinstance(self.strategy, str) and self.strategy in _STRATEGIES):
            raise ArgumentError(f"strategy={self.strategy!r} is none of {', '.join(_STRATEGIES)}.")
        is_auto = isinstance(self.mmap, str) and self.mmap == "auto"
        if not (is_auto or isinstance(self.mmap, bool)):
            raise ArgumentError(f'mmap={self.mmap!r} is none of "auto", True, False.')
        check_layout(self.layout)
        if not (self.cache is None or isinstance(self.cache, (bool, str, Path))):
            raise ArgumentError(f"cache={self.cache!r} is none of None, True, False, a folder.")
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
    return file_system_kind(folder).lower().startswith(_NETWORK_FILE_SYSTEMS)


def file_system_kind(folder: Path) -> str:
    """The kind of file system that a folder lies on, or would, such as "ext4"; "" if unknown."""
    real = folder.resolve()
    best, kind = "", ""
    for partition in psutil.disk_partitions(all=True):
        mount = partition.mountpoint
        inside = real == Path(mount) or Path(mount) in real.parents
        if inside and len(mount) >= len(best):
            best, kind = mount, partition.fstype
    return kind
