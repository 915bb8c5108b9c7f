"""LoRA adapters made, saved and merged by peft itself, for the checkpoints of the zoo."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer

from tests.support import quantized_zoo, reference
from tests.support.comparison import lean_model, stock_model

DEFAULTS: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 5,
    "target_modules": "all-linear",
    "init_lora_weights": False,
}


def make(
    hf: torch.nn.Module,
    target: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> Path:
    """Save an adapter for a transformers model (which then carries it) and return its folder.

    All that it trains is random. dtype: of the saved tensors, if not that of training.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(hf, peft.LoraConfig(**{**DEFAULTS, **config}))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        if dtype is not None:
            model.to(dtype)
        model.save_pretrained(target)
    return target


def for_case(case_id: str, folder: Path, target: Path, **options: Any) -> Path:
    """`make` for a checkpoint of the zoo."""
    return make(reference.hf_model(case_id, folder), target, **options)


def attached(
    case_id: str, folder: Path, *adapters: Path, dtype: torch.dtype = torch.float32
) -> Any:
    """A `PeftModel` of a checkpoint with adapters, all active."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf = reference.hf_model(case_id, folder, dtype)
        model = peft.PeftModel.from_pretrained(hf, adapters[0], adapter_name="0")
        for number, adapter in enumerate(adapters[1:], start=1):
            model.load_adapter(adapter, adapter_name=str(number))
        model.base_model.set_adapter([str(number) for number in range(len(adapters))])
    return model


def merged_by_peft(case_id: str, folder: Path, *adapters: Path, **options: Any) -> Any:
    """The transformers model after peft's `merge_and_unload`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attached(case_id, folder, *adapters, **options).merge_and_unload()


def stock_of(case_id: str, hf: Any, target: Path, **flags: Any) -> HookedTransformer:
    """Stock's load of a transformers model, by way of a folder."""
    hf.config.tie_word_embeddings = _is_tied(hf)
    hf.save_pretrained(target)
    return stock_model(case_id, target, **flags)


def _is_tied(hf: Any) -> bool:
    return hf.get_input_embeddings().weight is hf.get_output_embeddings().weight


def gaps(lean: HookedTransformer, stock: HookedTransformer) -> dict[str, float]:
    """Parameters that differ, with the norm of the difference relative to stock's norm."""
    wanted = dict(stock.named_parameters())
    found = {}
    for name, value in lean.named_parameters():
        one, other = value.detach().double(), wanted[name].detach().double()
        is_unused = name == "pos_embed.W_pos" and lean.cfg.positional_embedding_type == "alibi"
        if not is_unused and not torch.equal(one, other):
            found[name] = float((one - other).norm() / other.norm().clamp_min(1e-30))
    return found


def gaps_of_dense(lean: HookedTransformer, other: HookedTransformer) -> list[str]:
    """Names of parameters whose dequantized values differ."""
    one, two = quantized_zoo.dense_values(lean), quantized_zoo.dense_values(other)
    return [name for name in one if not torch.equal(one[name], two[name])]


def lean(folder: Path, adapter: Any, **arguments: Any) -> Any:
    """A lean load with an adapter, on the CPU."""
    return lean_model(folder, adapter=adapter, **arguments)


def read(adapter: Path, name: str = "adapter_model.safetensors") -> dict[str, torch.Tensor]:
    """The tensors of an adapter, in memory of their own."""
    return {key: value.clone() for key, value in load_file(adapter / name).items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> Path:
    """An adapter with these tensors and fields of the configuration."""
    folder.mkdir(exist_ok=True)
    config = peft.LoraConfig(**{**DEFAULTS, **fields}).to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
