"""What every road shares runs where TransformerLens cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import quantized_zoo
from tests.whole.test_house import MODULES, ROADS, ROOMS, room_of

HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformer_lens":
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Hidden())
"""
IMPORTS = """
from importlib import import_module

for name in sys.argv[1:]:
    import_module(f"tl_fastload.{name}")
try:
    import tl_fastload
    tl_fastload.LeanHookedTransformer
except ImportError as error:
    print(error)
"""
PLACES = """
import torch, transformers
from tl_fastload.ground.geometry import strides_of_order
from tl_fastload.ground.own_defaults import own_defaults
from tl_fastload.ground.role import Role
from tl_fastload.huggingface.config import Supported
from tl_fastload.huggingface.empty import empty_model
from tl_fastload.huggingface.pretrained import find, locate
from tl_fastload.placement.placer import Placer
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.quantized.quantizer import Quantizer
from tl_fastload.report.progress import Progress
from tl_fastload.request.keywords import Keywords
from tl_fastload.request.options import Options
from tl_fastload.source.aliases import NO_ALIASES
from tl_fastload.source.reader import FileReader

folder, architecture, target = sys.argv[1:]
reader, options = FileReader(), Options(progress=False)
supported = Supported((architecture,), lambda name, model_type, is_seq2seq: "is not wanted here.")
with own_defaults():
    located = locate(folder, in_memory=False, adapters=(), hub={}, aliases=NO_ALIASES)
    found = find(located, options, Keywords(), supported, reader, dtype=torch.float32)
    root = found.tree(torch.float32)
    model = empty_model(getattr(transformers, architecture), found.config, torch.float32)
    Placer(
        model,
        lambda name: torch.device("cpu"),
        assign=True,
        maps=reader.maps,
        map_any_layout=True,
        progress=Progress(False),
        strides_of=lambda order, module, name, shape: strides_of_order(shape, range(len(shape))),
        quantizer=None if found.spec is None else Quantizer(None, lambda name: Role(kind="matrix")),
    ).place(dict(root.named_parameters()))
values = dict(model.named_parameters())
kept = [name for name, value in values.items() if isinstance(value, QuantizedTensor)]
torch.save({n: v.dequantize() if n in kept else v.detach() for n, v in values.items()}, target)
print(len(kept))
"""


def run(code: str, *arguments: Any) -> str:
    """Run code in a process from which TransformerLens is hidden; what it prints."""
    command = [sys.executable, "-c", HIDE + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_every_room_but_the_roads_is_imported() -> None:
    last = ROOMS.index("cache")
    rooms = {room for room in ROOMS[: last + 1] if room not in ROADS}
    assert {"roads", "copies", "loading", "planning"} <= rooms
    said = run(IMPORTS, *(name for name in MODULES if room_of(name) in rooms))
    assert "transformer_lens is hidden" in said


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_a_checkpoint_becomes_transformers_own_model(
    kind: str | None, zoo: Any, tmp_path: Path
) -> None:
    folder = quantized_zoo.build(zoo, "llama-gqa")
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = dict(theirs.named_parameters())
    if kind is not None:
        hf = quantized_zoo.hf_model(folder, kind)
        layers = dict(quantized_zoo.layers(hf))
        expected |= {f"{n}.weight": quantized_zoo.dequantized(m) for n, m in layers.items()}
        folder = quantized_zoo.saved(folder, kind)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    kept = run(PLACES, folder, architecture, tmp_path / "values.pt")
    assert kept == ("0" if kind is None else str(len(layers)))
    found = torch.load(tmp_path / "values.pt")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
