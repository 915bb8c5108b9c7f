"""The public classes: TransformerBridge, loaded lean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tl_fastload.bridge import versions
from tl_fastload.bridge.load import boot_lean
from tl_fastload.bridge.processing import process_in_place
from tl_fastload.ground.boundary import guarded
from tl_fastload.ground.own_defaults import own_defaults
from tl_fastload.report.load_report import LoadReport
from tl_fastload.report.progress import Progress, ProgressOption


class LeanBridgeMixin:
    """Makes a `TransformerBridge` class load lean: `class Mine(LeanBridgeMixin, TheirClass)`."""

    load_report: LoadReport

    @classmethod
    @guarded("while booting")
    def boot_transformers_lean(
        cls, model_name: str | Path, *, progress: ProgressOption = None, **arguments: Any
    ) -> Any:
        return boot_lean(cls, model_name, progress=progress, steps=None, **arguments)

    @classmethod
    @guarded("while loading")
    def from_pretrained_lean(
        cls,
        model_name: str | Path,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
        fold_value_biases: bool = True,
        *,
        progress: ProgressOption = None,
        **arguments: Any,
    ) -> Any:
        steps = dict(
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )
        return boot_lean(cls, model_name, progress=progress, steps=steps, **arguments)

    @guarded("while processing")
    def process_weights(self, *args: Any, **kwargs: Any) -> None:
        """TransformerLens' `process_weights`, in place and one parameter at a time."""
        stock = super().process_weights  # type: ignore[misc]
        if versions.is_processed(self) or versions.is_recording(self):
            stock(*args, **kwargs)
            return
        with torch.inference_mode(False), own_defaults(), Progress(None) as progress:
            process_in_place(self, lambda: stock(*args, **kwargs), progress)

    @classmethod
    def of(cls, bridge: Any) -> Any:
        bridge.__class__ = cls
        return bridge


class LeanTransformerBridge(LeanBridgeMixin, versions.bridge_class()):  # type: ignore[misc]
    """`TransformerBridge` that loads lean; everything else about it is TransformerLens' own."""
