"""What a new installation must do: run from outside of the repository, with what pip installed.

python smoke_test.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tl_fastload.cli.console import end_on_sigterm


def main() -> None:
    import torch

    import tl_fastload
    from tl_fastload.embedded_model import embedded_model_path

    home = Path(tl_fastload.__file__).parent
    assert Path.cwd() not in home.parents, f"run this from another folder than {home}"
    assert version("tl-fastload") == tl_fastload.__version__
    name, tokens = embedded_model_path(), torch.arange(5, 13)[None]
    is_bridge = int(version("transformer-lens").split(".")[0]) >= 4
    cls = tl_fastload.LeanTransformerBridge if is_bridge else tl_fastload.LeanHookedTransformer
    print(tl_fastload.plan(name))
    model = cls.from_pretrained_lean(name)
    logits, cache = model.run_with_cache(tokens)
    assert torch.isfinite(logits).all()
    assert "blocks.0.attn.hook_pattern" in cache
    with tempfile.TemporaryDirectory() as folder:
        copy = model.save_lean(Path(folder) / "copy")
        assert torch.equal(cls.from_pretrained_lean(copy)(tokens), logits)
    if find_spec("bitsandbytes") is not None:
        cls.from_pretrained_lean(name, quantize="nf4")(tokens)
    for words in (["--version"], ["doctor"], ["plan", str(name)]):
        command = [sys.executable, "-m", "tl_fastload", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(
        f"tl_fastload {tl_fastload.__version__} works: Python {sys.version.split()[0]}, "
        f"torch {torch.__version__}, TransformerLens {version('transformer-lens')}"
    )


if __name__ == "__main__":
    end_on_sigterm()
    main()
