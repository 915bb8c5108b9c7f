"""Programs of several processes on one machine, with torchrun's environment, and what they load.

`python -m tests.support.torchrun PROCESSES PROGRAM ARGUMENTS` imports a program of tests.support
once, and forks the processes then: importing takes longer than most of what they do.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import traceback
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
    """Run a program of tests.support in several processes of this machine."""
    module = "tests.support.torchrun"
    done = subprocess.run(
        [sys.executable, "-m", module, str(n_processes), program, str(folder), *parts],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, _, told = done.stderr.partition("Traceback")  # the first: others only say that it failed
    assert done.returncode == 0, told[:5000] or done.stderr[-5000:]


def main(n_processes: int, program: str, folder: Path, parts: list[str]) -> int:
    """Run a program; 1 if a process failed, which ends the others."""
    module = importlib.import_module(f"tests.support.{program}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(n_processes), "LOCAL_WORLD_SIZE": str(n_processes)}
    running = set()
    for rank in range(n_processes):
        child = os.fork()
        if child:
            running.add(child)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        try:
            module.main(folder, *([parts] if parts else []))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    failed = False
    while running:
        child, status = os.wait()
        running.discard(child)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:]))
