"""Run by test_wrappers.py: `python lightning_sharded.py FOLDER`.

Lightning starts the second process.

A model that trains, in parts, beside a frozen lens that both processes share.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from tests.support.lightning_modules import PLACE, Sae, data, trainer
from tl_fastload import LeanHookedTransformer
from tl_fastload.embedded_model import embedded_model_path
from tl_fastload.lightning import FrozenSubmodulesMixin


class Probe(FrozenSubmodulesMixin, pl.LightningModule):  # type: ignore[misc]
    """An autoencoder whose parameters lie in parts, and a lens likewise."""

    frozen_submodules = ("lens",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sae = Sae()
        self.lens: Any = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.lens is None:
            mesh = self.device_mesh["data_parallel"]
            self.lens = LeanHookedTransformer.from_pretrained_lean(
                embedded_model_path(), mesh=mesh, parallel="fsdp", progress=False
            )
            fully_shard(self.sae, mesh=mesh)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        torch.manual_seed(self.trainer.global_step)
        _, cache = self.lens.run_with_cache(batch[0], names_filter=PLACE)
        out, _ = self.sae(cache[PLACE])
        loss: torch.Tensor = (out - cache[PLACE]).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.sae.parameters(), lr=1e-2)


def fit(epochs: int, checkpoint: Path | None = None) -> Any:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    probe = Probe()
    made = trainer("lightning.pytorch", epochs, strategy=strategy, devices=2)
    made.fit(probe, data(), ckpt_path=checkpoint)
    return made


def main(folder: Path) -> None:
    whole = fit(2)
    fit(1).save_checkpoint(folder / "one.ckpt")
    resumed = fit(2, folder / "one.ckpt")
    losses = [made.lightning_module.losses for made in (whole, resumed)]
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.save(losses, folder / f"losses-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
