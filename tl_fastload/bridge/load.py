"""One load of a bridge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tl_fastload.bridge.boot import run_boot
from tl_fastload.bridge.leftovers import require_none_left
from tl_fastload.bridge.placing import place
from tl_fastload.ground.own_defaults import own_defaults
from tl_fastload.huggingface.runnable import runnable_model
from tl_fastload.huggingface.tree import checkpoint_promises
from tl_fastload.report.progress import Progress
from tl_fastload.source.checkpoint import open_weights, resolve_config
from tl_fastload.source.reader import FileMaps, FileReader


class Files:
    def __init__(self, name, reader, hf_model=None):
        self.location = resolve_config(name)
        self.reader = reader
        self.ledger = None

    def config(self, revision):
        return transformers.AutoConfig.from_pretrained(self.location.folder)

    def tokenizer(self, name, **kwargs):
        try:
            return transformers.AutoTokenizer.from_pretrained(self.location.folder, **kwargs)
        except Exception:
            return None

    def model(self, model_class, config, dtype, attention):
        checkpoint = open_weights(self.location)
        self.reader.maps = FileMaps(self.reader.files)
        promises, notes = checkpoint_promises(checkpoint, self.reader, True)
        model, self.ledger = runnable_model(
            model_class, config, promises, dtype, self.location.folder, attention
        )
        return model


def boot_lean(cls, name, *, progress=None, steps=None, device=None, **arguments) -> Any:
    reader = FileReader()
    with torch.inference_mode(False), own_defaults(), Progress(progress) as bar:
        files = Files(name, reader)
        bridge = run_boot(files, cls, str(name), **arguments)
        if steps is not None:
            bridge.__dict__["_lean_recording"] = True
            with torch.no_grad():
                bridge.enable_compatibility_mode(**steps)
            del bridge.__dict__["_lean_recording"]
        place(bridge, torch.device("cpu"), maps=reader.maps, is_raw=steps is None, progress=bar)
        require_none_left(bridge)
    reader.close()
    return bridge
