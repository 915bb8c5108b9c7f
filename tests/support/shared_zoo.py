"""Run by tests/shards/test_bridge.py in several processes.

Of each case of the bridge's zoo, two processes have half of the heads and columns each, or the load
says why not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support import bridge_zoo
from tests.support.bridge_zoo import RAW_ONLY, WRONG_WHEN_PROCESSED
from tests.support.several import check_close, check_equal
from tests.support.shared_bridge import LOADS
from tl_fastload.errors import LeanLoadError

_FOUR_HEADS = {"hidden_size": 48, "num_attention_heads": 4}
_TWO_KEYS = {**_FOUR_HEADS, "num_key_value_heads": 2}
_OWN_KEYS = {**_FOUR_HEADS, "num_key_value_heads": 4}
_SIZES: dict[str, dict[str, int]] = {
    "gpt2": {"n_head": 4, "n_embd": 48, "n_inner": 96},
    "gptj": {"n_head": 4, "n_embd": 64},
    "gpt-neo": {"hidden_size": 48, "num_heads": 4},
    **dict.fromkeys(("opt", "neox", "neox-sequential", "phi"), _FOUR_HEADS),
    **dict.fromkeys(("llama", "phi3", "gemma-mha", "qwen2-mha-tied"), _OWN_KEYS),
    **dict.fromkeys(("olmo", "olmo-clip", "olmo2", "olmo3"), _OWN_KEYS),
    **dict.fromkeys(("gemma", "gemma3"), _TWO_KEYS),
    "qwen3-mha": {**_OWN_KEYS, "head_dim": 12},
}
"""Of cases whose heads are an odd number."""

SHARED = (
    *("gpt1", "gpt2", "gptj", "gpt-neo", "neox", "neox-sequential", "phi", "bloom", "bloom-bare"),
    *("llama", "llama-gqa", "llama3-rope", "llama-head-dim", "mistral", "ministral3", "smollm3"),
    *("qwen2", "qwen2-mha-tied", "qwen3", "qwen3-mha", "phi3", "phi3-gqa", "starcoder2", "ernie"),
    *("gemma", "gemma-mha", "gemma2", "gemma2-scale", "gemma3", "vaultgemma", "cohere", "cohere2"),
    *("olmo", "olmo-clip", "olmo2", "olmo3", "olmo3-gqa", "glm", "glm4", "granite", "exaone4"),
    *("apertus", "arcee", "bitnet", "falcon-alibi", "hunyuan", "jais2", "mpt", "nanochat"),
    *("nemotron", "seed-oss", "stablelm"),
)
"""What has to be shared; the load of any other may say why it cannot be."""


def check(case: str, folder: Path, mesh: Any) -> None:
    if dist.get_rank() == 0:
        bridge_zoo.build(case, folder, **_SIZES.get(case, {}))
    dist.barrier()
    # Norms compute in float32 all the same, where what is added in another order shows.
    exact: dict[str, Any] = {"dtype": torch.float64, "mmap": False}
    for kind, load in LOADS.items():
        if kind == "processed" and case in {*RAW_ONLY, *WRONG_WHEN_PROCESSED}:
            continue
        try:
            model = load(folder, mesh=mesh, parallel="tp", **exact)
        except LeanLoadError as error:
            if case in SHARED or 'parallel="tp" shares' not in str(error):
                raise
            continue
        reference = load(folder, device="cpu", **exact)
        check_equal(model, reference)
        hooks = ("attn.hook_z", "attn.hook_pattern", "mlp.hook_post")
        known = tuple(hook for hook in hooks if f"blocks.1.{hook}" in reference.hook_dict)
        try:
            check_close(model, reference, 1e-5, known)
        except AssertionError as error:
            raise AssertionError(f"{case}, {kind}: {error}") from error


def main(folder: Path, cases: list[str]) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for case in cases:
        check(case, folder / case, mesh)
    dist.destroy_process_group()
