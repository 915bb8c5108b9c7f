"""Lightning modules beside a frozen lean model, for either name that Lightning goes by."""

from __future__ import annotations

import functools
import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support.comparison import lean_model
from tl_fastload.embedded_model import embedded_model_path
from tl_fastload.lightning import FrozenSubmodulesMixin

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
WIDTH = 128
PLACE = "blocks.1.hook_resid_post"


def embedded(**arguments: Any) -> Any:
    """The embedded model."""
    return lean_model(embedded_model_path(), **arguments)


class Sae(nn.Module):
    """A small sparse autoencoder."""

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Linear(WIDTH, features)
        self.decoder = nn.Linear(features, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.encoder(x).relu()
        return self.decoder(self.dropout(hidden)), hidden


@functools.cache
def sae_class(package: str) -> Any:
    """A LightningModule of that package: `Model(lens, features)` trains an `Sae`."""
    pl = importlib.import_module(package)

    class Model(FrozenSubmodulesMixin, pl.LightningModule):  # type: ignore[misc, name-defined]
        frozen_submodules = ("lens",)

        def __init__(self, lens: Any, features: int = 64) -> None:
            super().__init__()
            self.save_hyperparameters(ignore=["lens"])
            self.lens = lens
            self.sae = Sae(features)
            self.losses: list[float] = []
            self.modes: list[tuple[bool, bool]] = []

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            self.modes.append((self.lens.training, self.sae.training))
            # The masks of dropout are those of an uninterrupted run, whoever runs the step.
            torch.manual_seed(self.trainer.global_step)
            _, cache = self.lens.run_with_cache(batch[0], names_filter=PLACE)
            out, hidden = self.sae(cache[PLACE])
            loss = (out - cache[PLACE]).square().mean() + 1e-3 * hidden.abs().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]

    # Lightning and pickle look the class up by its name.
    Model.__qualname__ = Model.__name__ = f"Model_{package.replace('.', '_')}"
    globals()[Model.__name__] = Model
    return Model


def seeded(package: str, lens: Any, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return sae_class(package)(lens, **arguments)


def data() -> Any:
    """Four batches of tokens, always in the same order."""
    tokens = torch.randint(0, 231, (16, 8), generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=4)


def trainer(package: str, max_epochs: int, **arguments: Any) -> Any:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        **arguments,
    }
    return importlib.import_module(package).Trainer(max_epochs=max_epochs, **quiet)


def fit(package: str, model: Any, max_epochs: int, ckpt_path: Path | None = None) -> Any:
    """Train; the Trainer."""
    made = trainer(package, max_epochs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(model, data(), ckpt_path=ckpt_path)
    return made


def save(package: str, model: Any, path: Path, epochs: int = 1) -> Path:
    """The checkpoint of a model that was trained."""
    fit(package, model, epochs).save_checkpoint(path)
    return path


def one_epoch(folders: Any) -> Path:
    """The checkpoint of one epoch beside the processed, embedded model."""
    return save(PACKAGES[0], seeded(PACKAGES[0], embedded()), folders.mktemp("trained") / "a.ckpt")


def edited(path: Path, target: Path, change: Any) -> Path:
    """A checkpoint with something changed in it."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, target)
    return target
