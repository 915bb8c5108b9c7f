"""Run by test_lightning_wrappers.py: `python lightning_ddp.py PACKAGE QUANTIZE FOLDER`.

Lightning starts the second process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support.lightning_modules import data, embedded, sae_class, seeded, trainer
from tl_fastload import DifferentModelError


def main(package: str, quantize: str, folder: Path) -> None:
    wanted = None if quantize == "none" else quantize

    def fit(model: Any, epochs: int, ckpt_path: Path | None = None) -> Any:
        made = trainer(package, epochs, strategy="ddp", devices=2)
        made.fit(model, data(), ckpt_path=ckpt_path)
        return made

    whole = seeded(package, embedded(quantize=wanted))
    fit(whole, 3)
    first = seeded(package, embedded(quantize=wanted))
    before = [(p.data_ptr(), p._version) for p in first.lens.parameters() if wanted is None]
    fit(first, 1).save_checkpoint(folder / "one.ckpt")
    # DistributedDataParallel writes what it sends around; frozen weights it must leave alone.
    assert before == [(p.data_ptr(), p._version) for p in first.lens.parameters() if wanted is None]
    torch.manual_seed(5)
    second = sae_class(package)(embedded(quantize=wanted))
    fit(second, 3, folder / "one.ckpt")
    other = sae_class(package)(embedded(quantize=wanted, fold_ln=False))
    refused = False
    try:
        fit(other, 3, folder / "one.ckpt")
    except DifferentModelError:
        refused = True
    losses = {"whole": whole.losses, "first": first.losses, "second": second.losses}
    state = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.save({**losses, "state": state, "refused": refused}, folder / f"result-{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
