"""Models that several processes share, on one machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import zoo
from tests.support.torchrun import run_program, save_two
from tl_fastload.ground import compat

pytestmark = pytest.mark.skipif(
    compat.why_no_shards() is not None, reason="this torch cannot share models"
)


def test_two_processes_share_a_model(tmp_path: Path) -> None:
    save_two(tmp_path)
    zoo.build("mixtral", tmp_path / "mixtral")
    run_program(2, "shared_lens", tmp_path, "fully", "tensor")


@pytest.mark.slow
def test_three_processes_with_sizes_that_do_not_divide(tmp_path: Path) -> None:
    for case in ("gpt2", "llama-gqa1-tied", "mixtral", "apertus"):
        zoo.build(case, tmp_path / ("gpt2-odd" if case == "gpt2" else case))
    run_program(3, "shared_lens", tmp_path, "awkward", "beside")


@pytest.mark.slow
def test_two_processes_share_heads_of_other_architectures(tmp_path: Path) -> None:
    four = {"num_attention_heads": 4, "hidden_size": 64}
    zoo.build("gemma2", tmp_path / "gemma2")
    zoo.build("gemma3", tmp_path / "gemma3", **four, num_key_value_heads=2)
    zoo.build("gpt-neo", tmp_path / "gpt-neo", num_heads=4, max_position_embeddings=40)
    zoo.build("neox", tmp_path / "neox", **four)
    run_program(2, "shared_lens", tmp_path, "tensor-others")
