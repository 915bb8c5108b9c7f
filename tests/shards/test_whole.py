"""Models that several processes share, started by torchrun on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.support import zoo
from tl_fastload.ground import compat

pytestmark = pytest.mark.skipif(
    compat.why_no_shards() is not None, reason="this torch cannot share models"
)


def run(n_processes: int, folder: Path, *parts: str) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(
            f"--nproc-per-node={n_processes}",
            "-m",
            "tests.support.shared_lens",
            str(folder),
            *parts,
        ),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, _, told = done.stderr.partition("Traceback")  # the first: others only say that it failed
    assert done.returncode == 0, told[:5000]


def test_two_processes_share_a_model(tmp_path: Path) -> None:
    gpt2 = GPT2Config(n_layer=2, n_embd=256, n_head=4, vocab_size=1000, n_positions=64)
    GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    llama = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=256,
        intermediate_size=704,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    zoo.build("mixtral", tmp_path / "mixtral")
    run(2, tmp_path, "fully", "tensor")


@pytest.mark.slow
def test_three_processes_with_sizes_that_do_not_divide(tmp_path: Path) -> None:
    for case in ("gpt2", "llama-gqa1-tied", "mixtral", "apertus"):
        zoo.build(case, tmp_path / ("gpt2-odd" if case == "gpt2" else case))
    run(3, tmp_path, "awkward", "beside")
