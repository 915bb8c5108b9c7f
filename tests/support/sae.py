"""A small SAE of SAELens', at one place of a model."""

from __future__ import annotations

from typing import Any

import torch

HOOK = "blocks.1.hook_resid_pre"


def small_sae(d_model: int) -> Any:
    from sae_lens import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=d_model, d_sae=3 * d_model, device="cpu"))
    sae.cfg.metadata.hook_name = HOOK
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return sae
