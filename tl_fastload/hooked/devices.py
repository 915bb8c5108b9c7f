"""Devices as TransformerLens chooses them: functions of its own, whose modules have moved."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tl_fastload.ground.compat import TRANSFORMER_LENS


def default_device() -> str:
    """The device on which TransformerLens puts a model if none is asked for."""
    home = "utilities" if TRANSFORMER_LENS.major >= 3 else "utils"
    return str(import_module(f"transformer_lens.{home}").get_device())


def device_of_block(index: int, cfg: Any) -> Any:
    """Where the forward pass looks for a block: TransformerLens' `get_device_for_block_index`."""
    home = "multi_gpu" if TRANSFORMER_LENS.major >= 3 else "devices"
    module = import_module(f"transformer_lens.utilities.{home}")
    return module.get_device_for_block_index(index, cfg)
