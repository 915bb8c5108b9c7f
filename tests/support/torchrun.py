"""Programs of several processes, started by torchrun on one machine, and what they load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def save_two(folder: Path) -> None:
    """Checkpoints of a GPT-2 and a Llama, large enough to count what is read of them."""
    gpt2 = GPT2Config(n_layer=2, n_embd=256, n_head=4, vocab_size=1000, n_positions=64)
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    llama = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=256,
        intermediate_size=704,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")


def run_program(n_processes: int, program: str, folder: Path, *parts: str) -> None:
    """Run a program of tests.support in several processes of this machine, by torchrun."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(
            f"--nproc-per-node={n_processes}",
            "-m",
            f"tests.support.{program}",
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
